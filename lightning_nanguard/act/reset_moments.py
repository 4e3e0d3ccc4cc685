"""Empties the optimizer's state."""

from __future__ import annotations

from typing import final

from lightning_nanguard.act.base import Remedy, RunControl
from lightning_nanguard.types import DropMoments, Evidence, Fault, PlanStep


@final
class ResetMoments(Remedy):
    """Empties the optimizer's state if a fault comes back soon after the first attempt against it."""

    word = "reset moments"
    step = DropMoments

    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        """A reset, if the first attempt did not help."""
        return DropMoments() if attempt > 0 else None

    def apply(self, step: PlanStep, run: RunControl) -> None:
        """Empty the optimizers' state."""
        run.drop_moments()
