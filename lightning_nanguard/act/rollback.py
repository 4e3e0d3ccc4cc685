"""Goes back to a certified snapshot."""

from __future__ import annotations

from typing import final

from lightning_nanguard.act.base import Remedy, RunControl
from lightning_nanguard.types import Evidence, Fault, PlanStep, Restore


@final
class Rollback(Remedy):
    """Restores the last good state from memory, or an older one if the fault comes back soon."""

    word = "restore"
    step = Restore

    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        """A restore, one snapshot deeper for each attempt after the first."""
        return Restore(max(0, attempt - 1))

    def apply(self, step: PlanStep, run: RunControl) -> None:
        """Restore the learner."""
        assert isinstance(step, Restore)
        run.restore(step.depth)
