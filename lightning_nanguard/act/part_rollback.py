"""Puts back the part of the state that went bad."""

from __future__ import annotations

from typing import final

from lightning_nanguard.act.base import Remedy, RunControl
from lightning_nanguard.types import Evidence, Fault, PlanStep, RestorePart


@final
class PartRollback(Remedy):
    """Restores a part of the state that went bad alone, such as averaged weights or moments. No update is lost."""

    word = "restore part"
    step = RestorePart

    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        """Such a step, where a part of the state alone is bad."""
        return RestorePart() if evidence.bad_part else None

    def apply(self, step: PlanStep, run: RunControl) -> None:
        """Restore that part."""
        run.restore_part()
