"""Cuts the learning rate of a diverged learner."""

from __future__ import annotations

import math
from typing import final

from lightning_nanguard.act.base import Remedy, RunControl
from lightning_nanguard.act.rate_search import _FEW, _LEAST_OF_BEST, clipping_will_do, rehearsed_cut
from lightning_nanguard.errors import require
from lightning_nanguard.types import Evidence, Fault, PlanStep, Scale


@final
class ReduceLR(Remedy):
    """Cut the learning rate of a diverged learner, more at each attempt, and give it back after a healthy stretch.

    The first cut is ``factor``, the next ``factor ** 2``, ``factor ** 4``, …, at most to a tenth at once. Where the run
    allows it, a rate is rehearsed before it is taken: from the state gone back to, a few updates on the batch at hand
    show at which rate its loss really falls, and the cut goes there at once. It is a multiplier under whatever
    schedule there is.

    Args:
        factor: The first cut.
        min_lr: The rate is never cut below it.
        recover_after: Healthy updates after which a cut is tried back (``1 / factor`` at a time); towards rates that
            were proven it goes faster, across one that failed slower.
        rehearse: Whether to rehearse.

    Raises:
        ValueError: When an argument is out of its range.

    Example:
        >>> ReduceLR(factor=0.5).propose(Fault("exploding_loss", "learner", "loss"), Evidence(step=9), 1).factor
        0.25
    """

    word = "scale"
    step = Scale
    _largest_cut = 0.1
    _largest_blind_cut = 1 / 1024
    _grown = 25.0

    def __init__(
        self, factor: float = 0.5, min_lr: float = 0.0, recover_after: int = 1000, rehearse: bool = True
    ) -> None:
        require(0 < factor < 1, self, "factor", factor, "a number between 0 and 1")
        require(min_lr >= 0 and math.isfinite(min_lr), self, "min_lr", min_lr, "a finite number of at least 0")
        require(recover_after >= 1, self, "recover_after", recover_after, "an integer of at least 1")
        self.factor = factor
        self.min_lr = min_lr
        self.recover_after = recover_after
        self.rehearse = rehearse

    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        """A cut, unless the rate is at its floor."""
        if evidence.lr is not None and evidence.lr <= self.min_lr:
            return None
        smallest = min(self.factor, self._largest_cut)
        factor = max(self.factor**2 ** min(attempt, 10), smallest)
        if not evidence.comparable and evidence.growth > self._grown:
            # Nothing can be rehearsed: how far the weights went is the only measure of the rate.
            factor = min(factor, max(0.5 / evidence.growth, self._largest_blind_cut))
        return Scale(factor, self.min_lr)

    def apply(self, step: PlanStep, patient: RunControl) -> None:
        """Change the multiplier."""
        assert isinstance(step, Scale)
        rehearses = self.rehearse and step.factor < 1
        if rehearses and step.clipped and not step.firm and clipping_will_do(patient.rehearse, step.factor):
            return
        few = rehearses and patient.rehearsal_batches() <= _FEW
        found = rehearsed_cut(patient.rehearse, step.factor, few=few) if rehearses else None
        if found is None:
            # Nothing was tried: the curvature of one batch at one place is what is known.
            factor = min(step.factor, max(step.most, self._largest_blind_cut))
        else:
            # A rate proven long ago may be too high by now: a rehearsal that says so by far is believed.
            factor = max(found, min(step.least, 4 * found))
            if step.firm:
                factor = min(factor, max(step.most, _LEAST_OF_BEST * factor))
        patient.scale(factor, step.min_lr, limit=step.limit)
