"""Skips the update of a bad batch."""

from __future__ import annotations

from typing import final

from lightning_nanguard.act.base import Remedy, RunControl
from lightning_nanguard.types import Evidence, Fault, PlanStep, Skip


@final
class SkipStep(Remedy):
    """Leave the update out; the batch leaves nothing behind.

    The policy skips single bad batches whether or not this is listed; listing it says so in a configuration.
    """

    word = "skip"
    step = Skip

    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        """Nothing: what a skip can help was skipped before remedies are asked."""
        return None

    def apply(self, step: PlanStep, run: RunControl) -> None:
        """Undo what the batch touched."""
        run.skip()
