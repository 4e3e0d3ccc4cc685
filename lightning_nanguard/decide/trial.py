"""Judges a trial: pure functions of the losses of the same batches under several states.

The run, now and some updates later, is compared with an arm: a restart from an early snapshot with a lower rate.
Lowering the rate late in training makes any loss fall for a while. An arm has no such advantage, because it starts from
an early snapshot. The difference must be large, because a short trial finds a slightly better rate in a quarter of all
healthy runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import final

from lightning_nanguard.thresholds.trial import TrialThresholds
from lightning_nanguard.types import Fault, Trial


@final
@dataclass(frozen=True, slots=True)
class TrialLosses:
    """Losses of the same batches, in the same order, under each state.

    Attributes:
        start: Under the snapshot that the arm started from.
        best: Under the certified snapshot of the lowest loss level.
        now: Under the present state.
        later: Under the present state after as many updates as the arm made.
        arm: Under the arm.
        earlier_now: Losses of batches from before the trial, under the state in which it began.
        earlier_arm: The same under the arm.
        factor: Factor by which the arm multiplied the learning rate.
    """

    start: Sequence[float]
    best: Sequence[float]
    now: Sequence[float]
    later: Sequence[float]
    arm: Sequence[float]
    factor: float
    earlier_now: Sequence[float] = ()
    earlier_arm: Sequence[float] = ()


def judge_trial(losses: TrialLosses, limits: TrialThresholds) -> Trial:
    """Whether the run lacks a clear share of what can be learned, or has lost a clear share of what it had learned.

    All comparisons are of pairs: the same batch with the same random numbers. Only signs and ratios of differences
    are used, so the result does not depend on the scale of the loss or on a constant added to it.

    Example:
        >>> ruined = TrialLosses(start=[2.0] * 8, best=[2.0] * 8, now=[2.1] * 8, later=[2.0] * 8, arm=[1.0] * 8,
        ...                      factor=1 / 16)
        >>> judge_trial(ruined, TrialThresholds())
        Trial(lacks=1.0, base='start', factor=0.0625)
    """
    pairs = ((losses.start, losses.arm), (losses.now, losses.arm), (losses.later, losses.arm))
    if not all(share_above(*pair) >= limits.signs for pair in pairs):
        return Trial()
    # In ordered data new batches may be new to the run, so the run must be worse on earlier batches, too.
    if losses.earlier_arm and share_above(losses.earlier_now, losses.earlier_arm) < limits.signs:
        return Trial()
    start, best, arm = median(losses.start), median(losses.best), median(losses.arm)
    level = min(median(losses.now), median(losses.later))
    as_good = best < arm + limits.lacks * (start - arm)
    lacks = (level - arm) / (start - arm)
    if lacks > limits.lacks:
        return Trial(lacks, "best" if as_good else "start", losses.factor)
    lost = all(share_above(one, losses.best) >= limits.signs for one in (losses.now, losses.later))
    if lost and level - best > limits.lost * (start - best):
        return Trial(lacks, "best", losses.factor)
    return Trial()


def may_begin(fault: Fault, made: int, updates: int, limits: TrialThresholds) -> bool:
    """Whether another trial of a suspicion may begin. Trials of a plateau may use a small share of the updates.

    Args:
        fault: The suspicion.
        made: Updates that the arms of earlier trials have made.
        updates: Updates of the run so far.
        limits: How many updates a trial takes, and which share of the run's updates trials may take.

    Example:
        >>> plateau = Fault("stuck_loss", "learner", "loss", None, certain=False, doubtful=True)
        >>> [may_begin(plateau, 160, updates, TrialThresholds()) for updates in (1_000, 20_000)]
        [False, True]
    """
    cost = len(limits.factors) * limits.picked_after + limits.picked * (limits.updates - limits.picked_after)
    return not fault.doubtful or made + cost <= limits.most_share * updates


def share_above(higher: Sequence[float], lower: Sequence[float]) -> float:
    """Share of the batches whose loss in ``higher`` is above the one in ``lower``."""
    # NaN counts as higher than any number.
    return fmean(math.isfinite(low) and not high <= low for high, low in zip(higher, lower, strict=True))
