"""Goes back to a certified snapshot, as a whole or in a part."""

from __future__ import annotations

from typing import final

from lightning_nanguard.act.base import Remedy, RunControl
from lightning_nanguard.types import Evidence, Fault, PlanStep, Restore, RestoreAverages, RestoreScale


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


@final
class ScaleRollback(Remedy):
    """Restores the scale of the GradScaler if only the scale is bad.

    The GradScaler has skipped every update since then, so no update is lost.
    """

    word = "restore scale"
    step = RestoreScale

    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        """A restore of the scale, if nothing else is bad."""
        return RestoreScale() if evidence.alone == "scale" else None

    def apply(self, step: PlanStep, run: RunControl) -> None:
        """Restore the scale."""
        run.restore_scale()
