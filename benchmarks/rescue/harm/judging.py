"""What touched and harmed mean, and what can be said of a share of which little was seen."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.rescue.running import Trained

TWINS = 5
"""Runs with other weights and another order of the data that say how much the end of a run owes to chance."""

ROUNDING = 1e-4
"""Share of the bare run's own improvement below which a difference is that of rounding."""


def is_healthy(run: Trained, least_gain: float) -> bool:
    """Whether a bare run came to its end, stayed finite and fell by ``least_gain`` of its untrained loss."""
    return run.ended_well and run.initial - run.final >= least_gain * abs(run.initial)


def is_touched(interventions: int, digest: str, bare_digest: str) -> bool:
    """Whether anything was done, or anything in the end differs by a bit."""
    return interventions > 0 or digest != bare_digest


def is_harmed(final: float, ended: bool, initial: float, bare: float, twins: Sequence[float]) -> bool:
    """Whether a touched run ended worse than its bare twin by more than chance does.

    The reseeded twins differ from the bare run in nothing but chance. The measure of chance is their range: five draws
    of a normal distribution span 2.3 standard deviations on average, and a run that differs from its twin by the seed
    alone is 2.3 deviations worse in one of twenty cases (a difference of two draws has 1.4 times the deviation of one).
    It is a difference of losses, so that neither their unit nor a constant on top counts.

    Args:
        final: Held-out loss of the touched run.
        ended: Whether it came to its end with finite tensors; if not, it is harmed.
        initial: Held-out loss of the untrained model.
        bare: Held-out loss of the bare run.
        twins: Held-out losses of the reseeded bare runs that stayed finite.
    """
    if not ended or not math.isfinite(final):
        return True
    chance = max(twins) - min(twins) if twins else 0.0
    return final - bare > chance + ROUNDING * abs(initial - bare)


def upper_bound(seen: int, of: int, confidence: float = 0.95) -> float:
    """Largest share that is not excluded where ``seen`` of ``of`` were seen (Clopper and Pearson, one-sided).

    With none seen it is close to 3 / ``of``.

    Example:
        >>> round(upper_bound(0, 1000), 5), round(upper_bound(2, 1000), 5)
        (0.00299, 0.00628)
    """
    if seen >= of:
        return 1.0
    low, high = seen / of, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _at_most(seen, of, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def _at_most(seen: int, of: int, share: float) -> float:
    """Probability of at most ``seen`` in ``of`` draws."""
    return sum(math.comb(of, k) * share**k * (1 - share) ** (of - k) for k in range(seen + 1))
