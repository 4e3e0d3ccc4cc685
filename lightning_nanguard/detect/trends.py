"""Trends of an optimizer's newest losses and gradient norms: pure functions of lists, the oldest value first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import fmean, median

from lightning_nanguard.thresholds.detection import (
    BurstThresholds,
    ClimbThresholds,
    HistoryThresholds,
    UsualNormThresholds,
)


def spread(values: Iterable[float]) -> float:
    """Median absolute deviation, scaled to the standard deviation of a normal distribution.

    Example:
        >>> round(spread([1.0, 2.0, 3.0, 4.0, 100.0]), 3)
        1.483
    """
    values = list(values)
    centre = median(values)
    return 1.4826 * median(abs(value - centre) for value in values)


def loss_noise(losses: Sequence[float], thresholds: HistoryThresholds) -> float:
    """The noise of some losses: the range of a few, else the spread of differences, which excludes a trend."""
    if len(losses) < thresholds.min_noise_losses:
        return max(losses, default=0.0) - min(losses, default=0.0)
    # The difference of two losses has twice the variance of one.
    return spread([after - before for before, after in pairwise(losses)]) / math.sqrt(2)


def loss_level(losses: Sequence[float]) -> float | None:
    """Mean of some losses without the highest. A median would miss a model that fails on some batches."""
    values = sorted(losses)
    return fmean(values[:-1] or values) if values else None


def loss_falls(losses: Sequence[float], errors: float) -> bool:
    """Whether the newer half of some losses is below the older half by more than ``errors`` standard errors.

    The standard error is the noise in each half, divided by the square root of the number of losses in it.
    """
    half = len(losses) // 2
    older, newer = losses[:half], losses[half:]
    noise = spread([loss - median(part) for part in (older, newer) for loss in part])
    return median(newer) < median(older) - errors * noise / math.sqrt(half)


def usual_norm(norms: Sequence[float], first: float, thresholds: UsualNormThresholds) -> float | None:
    """A low quantile of the gradient norms, or the minimum of a few; ``None`` with too few.

    It is at least a share of the first norm.

    Args:
        norms: Healthy gradient norms above 0.
        first: The first norm of the run, 0 if it is not known.
        thresholds: Which quantile it is, and how many norms it needs.
    """
    norms = sorted(norms)
    if len(norms) < thresholds.min_norms:
        return None
    few = len(norms) < thresholds.quantile_norms
    usual = norms[0] if few else norms[len(norms) // thresholds.quantile_part]
    return max(usual, thresholds.min_share_of_first * first)


def climbs(values: Sequence[float], least: float, thresholds: ClimbThresholds) -> bool:
    """Whether the newest values are above the range of those before by more than ``least``, without the one between."""
    newest, before = values[-thresholds.newest :], values[: -thresholds.newest - 1]
    if len(before) < thresholds.min_others:
        return False
    return min(newest) > median(before) + max(thresholds.noise * spread(before), least)


def has_burst(norms: Sequence[float], first: float, thresholds: BurstThresholds) -> bool:
    """Whether a norm is above the first norm of the run, and far above all of the several norms before it."""
    return any(
        norms[i] > max(first, thresholds.times * max(norms[max(0, i - thresholds.before) : i]))
        for i in range(thresholds.min_before, len(norms))
    )
