"""Skips the update of a bad batch."""

from __future__ import annotations

from typing import final

from lightning_nanguard.act.base import Remedy, RunControl
from lightning_nanguard.errors import require
from lightning_nanguard.types import Evidence, Fault, PlanStep, Skip


@final
class SkipStep(Remedy):
    """Leave the update out; the batch leaves nothing behind.

    The policy skips single bad batches whether or not this is listed; listing it says so in a configuration.

    Args:
        keep_good_samples: Make the update from the good samples of a bad batch, exactly as if the loader had given that
            smaller batch: always, never, or with ``None`` once most updates had to be skipped. Torch's
            ``default_collate`` must have put the batch together, and a check, made once, must show that its loss is the
            mean of the losses of its parts. It works where updates are read before they are made, in one process, under
            automatic optimization without LBFGS. Elsewhere the batch is skipped as a whole, which is said once.

    Raises:
        ValueError: When ``keep_good_samples`` is neither true nor false nor ``None``.
    """

    word = "skip"
    step = Skip

    def __init__(self, keep_good_samples: bool | None = None) -> None:
        valid = keep_good_samples is None or isinstance(keep_good_samples, bool)
        require(valid, "SkipStep", "keep_good_samples", keep_good_samples, "True, False or None")
        self.keep_good_samples = keep_good_samples

    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        """Nothing: what a skip can help was skipped before remedies are asked."""
        return None

    def apply(self, step: PlanStep, run: RunControl) -> None:
        """Undo what the batch touched."""
        run.skip()
