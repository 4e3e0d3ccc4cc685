"""Puts averaged copies of the weights back that went bad."""

from __future__ import annotations

from typing import final

from lightning_nanguard.act.base import Remedy, RunControl
from lightning_nanguard.types import Evidence, Fault, PlanStep, RestoreAverages


@final
class AveragesBack(Remedy):
    """Puts averaged copies of the weights (EMA, SWA) back that went bad. Weights, moments and rate stay as they are."""

    word = "restore average"
    step = RestoreAverages

    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        """Such a step, where the averages alone are bad."""
        return RestoreAverages() if evidence.averages_alone else None

    def apply(self, step: PlanStep, run: RunControl) -> None:
        """Put the averages back."""
        run.restore_averages()
