"""Searches the learning rate at which the loss of the newest batches falls."""

from __future__ import annotations

import math
from collections.abc import Callable

# How much of the best gain may be missing, of a gain that is counted up to so many times the loss it ends at: where the
# loss began far off, every rate gains nearly all.
_MISSING = 0.5


_COUNTED = 30.0


# A best loss this near to 0, over its scale, is of batches learned by heart. So have rates that come below the second.
_BY_HEART, _AS_GOOD = 3e-3, 0.05


# The same where the best rate takes the loss below half: what lags behind it there is slow, while before that all are.
_MISSING_OF_MUCH = 0.3


# On so few batches what is learned by heart takes the loss there, and it favours large rates.
_FEW = 2


# A loss higher by this than before, over its scale, is harm; one lower by less is no help behind such a rate.
_WORSE = 0.1


# The rate taken lies between these shares of the best.
_LEAST_OF_BEST = 1 / 16


_MOST_OF_BEST = 1 / 2


# Share of a cut's gain that may be missing without it, where it is not to be made.
_NEARLY = 0.02


def rehearsed_cut(
    rehearse: Callable[[float, int], float | None],
    largest: float,
    *,
    few: bool = False,
    tries: int = 10,
    updates: int = 8,
) -> float | None:
    """The cut at which the loss of the newest batches really falls.

    From ``largest`` down by a factor of four each, until a rate brings clearly less than a larger one did. Rates at the
    edge of stability look best for a few updates and fail later: taken is the lowest in a row below the best that
    brings nearly as much, at most half of the best and at least a sixteenth, or still less where that, too, takes the
    loss to next to nothing.

    Args:
        rehearse: Gives the mean loss, over its scale, after some updates at a cut.
        largest: The first cut tried.
        few: Whether they are very few.
        tries: How many are tried at most.
        updates: Updates of each try.

    Returns:
        The cut, ``None`` where no rate helped or a rehearsal could not be had.
    """
    before = rehearse(largest, 0)
    if before is None or not math.isfinite(before):
        return None
    best, lowest, best_after, least = None, largest, before, 0.0
    for power in range(tries):
        cut = largest * 0.25**power
        after = rehearse(cut, updates)
        if after is None:
            return None
        by_heart = before > _AS_GOOD and 0 <= best_after <= _BY_HEART
        counted = before if by_heart else min(before - best_after, _COUNTED * abs(best_after))
        if after < best_after:
            best, lowest, best_after, least = cut, cut, after, _LEAST_OF_BEST * cut
        elif best is not None and after > before + _WORSE:
            # A lower rate does harm: the larger one was good by accident (units died, say), and what helps is better.
            best_after, least = before - _WORSE, 0.0
        elif best is not None:
            missing = _MISSING_OF_MUCH if best_after < 0.5 * before and not few else _MISSING
            if after > best_after + missing * counted:
                break
            lowest = cut
            if by_heart and after <= _AS_GOOD:
                least = min(least, cut)
            elif cut <= least:
                break
    return None if best is None else min(_MOST_OF_BEST * best, max(lowest, least))


def clipping_will_do(rehearse: Callable[[float, int], float | None], cut: float, *, updates: int = 8) -> bool:
    """Whether, under the clipping that has just begun, the rate learns the newest batches about as fast as at two cuts.

    A rate that is too high by itself never does: at a lower one it does less harm.

    Args:
        rehearse: Gives the mean loss after some updates at a cut.
        cut: The first cut; the second is a quarter of it.
        updates: Updates of each try.
    """
    before, uncut = rehearse(1.0, 0), rehearse(1.0, updates)
    if before is None or uncut is None or not uncut < before:
        return False
    lower = (rehearse(one, updates) for one in (cut, cut / 4))
    return all(after is not None and uncut < after + _NEARLY * max(0.0, before - after) for after in lower)
