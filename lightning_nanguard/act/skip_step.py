"""Skips the update of a bad batch."""

from __future__ import annotations

from typing import final

from lightning_nanguard.act.base import Remedy, RunControl
from lightning_nanguard.errors import require
from lightning_nanguard.types import Evidence, Fault, PlanStep, Skip


@final
class SkipStep(Remedy):
    """Skips the update of a bad batch, and undoes everything else that the batch changed.

    The guard skips single bad batches even if this remedy is not listed. List it to set its argument.

    Args:
        keep_good_samples: Make the update from the good samples of a bad batch, exactly as if the loader had given this
            smaller batch: ``True`` always, ``False`` never, ``None`` once more than half of at least 20 updates were
            skipped. It needs a batch from torch's ``default_collate`` and a loss that is the mean of the losses of its
            parts, which the guard checks once. It also needs step readback, one process, and automatic optimization
            without LBFGS. Otherwise the whole batch is skipped, and the guard says so once.

    Raises:
        ValueError: If ``keep_good_samples`` is not ``True``, ``False`` or ``None``.
    """

    word = "skip"
    step = Skip

    def __init__(self, keep_good_samples: bool | None = None) -> None:
        valid = keep_good_samples is None or isinstance(keep_good_samples, bool)
        require(valid, "SkipStep", "keep_good_samples", keep_good_samples, "True, False or None")
        self.keep_good_samples = keep_good_samples

    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        """Nothing: the guard skips single bad batches before it asks remedies."""
        return None

    def apply(self, step: PlanStep, run: RunControl) -> None:
        """Undo what the batch changed."""
        run.skip()
