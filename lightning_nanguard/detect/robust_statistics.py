"""Statistics of losses or gradient norms that are robust against outliers and heavy tails."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median


def spread(values: Iterable[float]) -> float:
    """Median absolute deviation, scaled to the standard deviation of a normal distribution.

    Example:
        >>> round(spread([1.0, 2.0, 3.0, 4.0, 100.0]), 3)
        1.483
    """
    values = list(values)
    centre = median(values)
    return 1.4826 * median(abs(value - centre) for value in values)


def falling(values: Sequence[float], noise: float, errors: float) -> bool:
    """Whether the newer half of some values is below the older half by more than ``errors`` standard errors.

    The standard error is ``noise`` divided by the square root of the number of values in a half.

    Example:
        >>> falling([4.0, 4.0, 3.0, 3.0], noise=0.1, errors=2.0)
        True
    """
    half = len(values) // 2
    return median(values[half:]) < median(values[:half]) - errors * noise / math.sqrt(half)
