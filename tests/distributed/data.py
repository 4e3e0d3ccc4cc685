"""The batches of each rank, with faults in those of one rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tests.helpers import batches, with_nan

STEPS = 13
AT = 7
NORMS = [[1.0, math.nan, 5.0], [2.0, math.inf, 3.0, 9.0, math.nan, 4.0]]
"""What each of two ranks gives its metrics."""


def spoilt(rank: int, *at: int, count: int = STEPS) -> Callable[[int], list[Any]]:
    """Data of which one rank's hold a NaN in some batches."""

    def data(which: int) -> list[Any]:
        made = batches(count=count, seed=which)
        return [with_nan(batch, 1) if i in (at or (AT,)) and which == rank else batch for i, batch in enumerate(made)]

    return data


def far_off(rank: int, *at: int, count: int, factor: float = 1e15) -> Callable[[int], list[Any]]:
    """Data of which one rank's reach much too far in some batches, and are finite."""

    def data(which: int) -> list[Any]:
        made = batches(count=count, seed=which)
        return [(factor * x, y) if i in at and which == rank else (x, y) for i, (x, y) in enumerate(made)]

    return data


def without(*left_out: int) -> Callable[[int], list[Any]]:
    """Data that lack some batches."""
    return lambda which: [batch for i, batch in enumerate(batches(count=STEPS, seed=which)) if i not in left_out]
