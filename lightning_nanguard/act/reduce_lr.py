"""Cuts the learning rate of a diverged learner."""

from __future__ import annotations

import math
from typing import final

from lightning_nanguard.act.base import Remedy, RunControl
from lightning_nanguard.act.rate_search import clipping_suffices, rehearsed_cut
from lightning_nanguard.errors import require
from lightning_nanguard.thresholds.rate_search import CutThresholds
from lightning_nanguard.types import Evidence, Fault, PlanStep, Scale


@final
class ReduceLR(Remedy):
    """Lowers the learning rate of a diverged learner, more at each attempt, and raises it after many healthy updates.

    If batches can be run again, the guard first tries rates: a few updates on the newest batches, from the state of the
    rollback, show at which rate the loss falls, and the guard takes this rate. Otherwise the first cut is ``factor``,
    the next ``factor ** 2``, ``factor ** 4``, …, and at least a tenth. This cut is larger if the finding names a lower
    limit for the rate. The cut is a multiplier on the rate that the schedule sets.

    Args:
        factor: The first cut.
        min_lr: Lowest rate that a cut may lead to.
        recover_after: Number of healthy updates after which the guard tries to raise the rate (by ``1 / factor`` at a
            time). It waits less for rates that were proven, and longer for rates that failed.
        rehearse: Whether to try rates before a cut.
        thresholds: How a cut is chosen; ``None`` for the defaults.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> ReduceLR(factor=0.5).propose(Fault("exploding_loss", "learner", "loss"), Evidence(step=9), 1).factor
        0.25
    """

    word = "scale"
    step = Scale

    def __init__(
        self,
        factor: float = 0.5,
        min_lr: float = 0.0,
        recover_after: int = 1000,
        rehearse: bool = True,
        *,
        thresholds: CutThresholds | None = None,
    ) -> None:
        require(0 < factor < 1, self, "factor", factor, "a number between 0 and 1")
        require(min_lr >= 0 and math.isfinite(min_lr), self, "min_lr", min_lr, "a finite number of at least 0")
        require(recover_after >= 1, self, "recover_after", recover_after, "an integer of at least 1")
        self.factor = factor
        self.min_lr = min_lr
        self.recover_after = recover_after
        self.rehearse = rehearse
        self._limits = thresholds or CutThresholds()

    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        """A cut, unless the rate is at its floor."""
        if evidence.lr is not None and evidence.lr <= self.min_lr:
            return None
        if evidence.trial is not None and evidence.trial.lacks > 0:
            factor = evidence.trial.factor
            return None if factor == 1 else Scale(factor, self.min_lr, tried=True)
        limits = self._limits
        smallest = min(self.factor, limits.largest_at_once)
        factor = max(self.factor**2 ** min(attempt, limits.most_escalated), smallest)
        if not evidence.comparable and evidence.growth > limits.grown_unproven:
            # No rate can be tried: the growth of the weights is the only measure of the rate.
            factor = min(factor, max(self.factor / evidence.growth, limits.largest_untried))
        return Scale(factor, self.min_lr)

    def apply(self, step: PlanStep, run: RunControl) -> None:
        """Try rates if possible, and cut the learning rate."""
        assert isinstance(step, Scale)
        limits, rehearses = self._limits, self.rehearse and step.factor < 1 and not step.tried
        if rehearses and step.clipped and not step.firm and clipping_suffices(run.rehearse, step.factor, limits):
            return
        found = rehearsed_cut(run.rehearse, step.factor, limits) if rehearses else None
        if found is None:
            # No rate was tried, or none was good. Only the curvature of a batch and the rate of the state are known.
            factor = min(step.factor, max(step.most, limits.largest_untried), run.rate_factor_of_restored())
        else:
            factor = min(found, max(step.most, limits.least_of_best * found)) if step.firm else found
        run.scale(factor, step.min_lr, limit=step.limit, tried=step.tried)
