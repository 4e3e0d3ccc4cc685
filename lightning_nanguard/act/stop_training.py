"""Ends the run with a clear error."""

from __future__ import annotations

from typing import final

from lightning_nanguard.act.base import Remedy, RunControl
from lightning_nanguard.types import Evidence, Fault, PlanStep, Stop


@final
class StopTraining(Remedy):
    """Ends the run with ``TrainingDivergedError``. The module then has the last good weights."""

    word = "stop"
    step = Stop

    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        """A stop."""
        return Stop("skipping is not enough, and StopTraining is listed")

    def apply(self, step: PlanStep, run: RunControl) -> None:
        """Nothing: the guard ends the run itself."""
