"""Restores the scale of the GradScaler."""

from __future__ import annotations

from typing import final

from lightning_nanguard.act.base import Remedy, RunControl
from lightning_nanguard.types import Evidence, Fault, PlanStep, RestoreScale


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
