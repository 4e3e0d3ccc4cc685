"""Restores averages: copies of the weights, and running statistics."""

from __future__ import annotations

from typing import final

from lightning_nanguard.act.base import Remedy, RunControl
from lightning_nanguard.types import Evidence, Fault, PlanStep, RestoreAverages


@final
class AverageRollback(Remedy):
    """Restores averaged copies of the weights (EMA, SWA) and running statistics if only they are bad.

    No update is made from them, so no update is lost.
    """

    word = "restore averages"
    step = RestoreAverages

    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        """A restore of the averages, if nothing else is bad."""
        return RestoreAverages() if evidence.alone == "averages" else None

    def apply(self, step: PlanStep, run: RunControl) -> None:
        """Restore the averages."""
        run.restore_averages()
