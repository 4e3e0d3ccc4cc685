"""Searches the learning rate at which the loss of the newest batches falls, by rehearsals. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable

from lightning_nanguard.thresholds.rate_search import CutThresholds

Rehearse = Callable[[float, int], float | None]
"""Gives the mean loss of the newest batches, in loss units, after some updates with the rate times a factor."""


def rehearsed_cut(rehearse: Rehearse, largest: float, limits: CutThresholds) -> float | None:
    """Search the cut at which the loss of the newest batches falls.

    Rates are tried from ``largest`` down, until one gains less than half of what a larger one did. Rates at the edge of
    stability look best for a few updates and fail later. So the result is a lower rate than the best one: the lowest of
    the next rates that gain at least half as much, within a limited range.

    Args:
        rehearse: Tries a rate.
        largest: The first factor tried.
        limits: The thresholds.

    Returns:
        The factor, ``None`` if no rate helped or none could be tried.
    """
    before = rehearse(largest, 0)
    if before is None or not math.isfinite(before):
        return None
    best, lowest, best_after, least = None, largest, before, 0.0
    for power in range(limits.tries):
        cut = largest * limits.ratio**power
        after = rehearse(cut, limits.updates)
        if after is None:
            return None
        if after < best_after:
            best, lowest, best_after, least = cut, cut, after, limits.least_of_best * cut
        elif best is not None and after > before + limits.harm:
            # If a lower rate does harm, the larger one was good only by chance, for example because units died.
            best_after, least = before - limits.harm, 0.0
        elif best is not None:
            if after > best_after + limits.missing * (before - best_after):
                break
            lowest = cut
            if cut <= least:
                break
    return None if best is None else min(limits.most_of_best * best, max(lowest, least))


def clipping_suffices(rehearse: Rehearse, cut: float, limits: CutThresholds) -> bool:
    """Whether the present rate, with clipping, learns about as fast as two lower rates.

    A rate that is too high by itself never does.

    Args:
        rehearse: Tries a rate.
        cut: The first cut; the second is smaller by the ratio of the search.
        limits: The thresholds.
    """
    before, uncut = rehearse(1.0, 0), rehearse(1.0, limits.updates)
    if before is None or uncut is None or not uncut < before:
        return False
    lower = (rehearse(one, limits.updates) for one in (cut, cut * limits.ratio))
    return all(after is not None and uncut < after + limits.nearly * max(0.0, before - after) for after in lower)
