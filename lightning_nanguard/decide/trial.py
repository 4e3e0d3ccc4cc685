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
from statistics import fmean
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
        kept_run: Losses of other batches, from before the trial and spread over it, under the run.
        kept_arm: The same under the arm.
        factor: Factor by which the arm multiplied the learning rate. An arm at the present rate, with a factor of 1,
            continued from the best snapshot.
    """

    start: Sequence[float]
    best: Sequence[float]
    now: Sequence[float]
    later: Sequence[float]
    arm: Sequence[float]
    factor: float
    kept_run: Sequence[float] = ()
    kept_arm: Sequence[float] = ()


def judge_trial(losses: TrialLosses, limits: TrialThresholds) -> Trial:
    """Whether the run lacks a clear share of what can be learned, or has lost a clear share of what it had learned.

    All comparisons are of pairs: the same batch with the same random numbers. Only ratios of differences are used, so
    the result does not depend on the scale of the loss or on a constant added to it.

    Example:
        >>> ruined = TrialLosses(start=[2.0] * 8, best=[2.0] * 8, now=[2.1] * 8, later=[2.0] * 8, arm=[1.0] * 8,
        ...                      factor=1 / 16)
        >>> judge_trial(ruined, TrialThresholds())
        Trial(lacks=1.0, base='start', factor=0.0625, continues=True)
    """
    start, now, later = (lead(losses.arm, one, limits) for one in (losses.start, losses.now, losses.later))
    if not min(start, now, later) > 0:
        return Trial()
    # In ordered data the newest batches may be new to the run, or all of one kind, so the run must be worse on others.
    if losses.kept_arm and not lead(losses.kept_arm, losses.kept_run, limits) > 0:
        return Trial()
    from_best = losses.factor == 1
    as_good = not from_best and lead(losses.arm, losses.best, limits) < limits.lacks * start
    lacks = min(now, later) / start
    if lacks > limits.lacks:
        return Trial(lacks, "best" if as_good or from_best else "start", losses.factor, not as_good)
    lost = min(lead(losses.best, one, limits) for one in (losses.now, losses.later))
    if lost > 0 and lost > limits.lost * lead(losses.best, losses.start, limits):
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


def is_enough(trial: Trial, shown: int, limits: TrialThresholds) -> bool:
    """Whether the guard acts on a trial that confirms a suspicion, or makes another one first.

    Args:
        trial: The trial.
        shown: Number of trials in a row that confirmed a suspicion, this one included.
        limits: How many are needed, and at which share one is enough.

    Example:
        >>> [is_enough(Trial(share, factor=1 / 16), 1, TrialThresholds()) for share in (0.2, 0.8)]
        [False, True]
    """
    # An arm at the rate of the run has no advantage, so one trial is enough.
    return shown >= limits.in_a_row or trial.lacks > limits.plain or trial.factor == 1


def pick_arm(factors: Sequence[float], levels: Sequence[float], first: float | None, limits: TrialThresholds) -> int:
    """Index of the arm to continue from: the one with the highest rate of all that are about as good as the best.

    A short trial prefers low rates, which learn less in the rest of the run.

    Args:
        factors: Factor of each arm on the learning rate.
        levels: Mean loss of each arm.
        first: First loss of the run; ``None`` if it is not known.
        limits: Which share of what can be learned an arm may lack.

    Example:
        >>> pick_arm([1 / 16, 1 / 64, 1 / 256], [1.05, 1.0, 1.8], 3.0, TrialThresholds())
        0
    """
    best = min(levels)
    learned = 0.0 if first is None else max(0.0, first - best)
    as_good = [index for index, level in enumerate(levels) if level <= best + limits.lacks * learned]
    return max(as_good, key=lambda index: (factors[index], -levels[index]))


def lead(ahead: Sequence[float], behind: Sequence[float], limits: TrialThresholds) -> float:
    """By how much the mean of the losses ``ahead`` is below that of ``behind``, without the batches that say so most.

    Args:
        ahead: Losses under one state.
        behind: Losses of the same batches under another one.
        limits: Share of the batches that are left out.

    Example:
        >>> lead([1.0, 1.0, 1.0, 1.0, 1.0], [900.0, 2.0, 2.0, 0.0, 0.0], TrialThresholds())
        0.0
    """
    gains = sorted(_gain(low, high) for low, high in zip(ahead, behind, strict=True))
    if not gains or gains[0] == -math.inf:
        return -math.inf
    return fmean(gains[: max(1, int(len(gains) * (1 - limits.left_out)))])


def _gain(low: float, high: float) -> float:
    # A loss that is not finite is higher than any number.
    if not math.isfinite(low):
        return -math.inf
    return high - low if math.isfinite(high) else math.inf
