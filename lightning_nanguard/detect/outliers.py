"""Finds a number that is far from all numbers shortly before and after it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

Far = Callable[[float, Sequence[float]], bool]
"""Whether a number is far from the others."""


@final
@dataclass(frozen=True, slots=True)
class Outlier:
    """A number that is far from all numbers shortly before and after it.

    Attributes:
        step: The update of this number.
        value: The number.
        lowest: The lowest of the others.
        highest: The highest of the others.
    """

    step: int
    value: float
    lowest: float
    highest: float

    @property
    def distance(self) -> float:
        """How far it is from the others."""
        return max(self.value - self.highest, self.lowest - self.value)


@final
class OutlierSearch:
    """Finds outliers in a sequence of numbers, each a few numbers after it came.

    A number that is far from those before it may be the first of many. Only the numbers after it show that it stands
    alone.

    Args:
        far: Says whether a number is far from the others.
        before: Most numbers before an outlier that it is compared with.
        least: Fewest of them.
        after: Numbers after it that it is compared with.

    Example:
        >>> search = OutlierSearch(times_above(100.0), before=8, least=2, after=1)
        >>> [found.value for step, norm in enumerate([1.0, 2.0, 500.0, 1.5]) if (found := search.add(step, norm))]
        [500.0]
    """

    def __init__(self, far: Far, *, before: int, least: int, after: int) -> None:
        self._far = far
        self._least = least + 1 + after
        self._after = after
        self._values: deque[float] = deque(maxlen=before + 1 + after)
        self._steps: deque[int] = deque(maxlen=1 + after)

    def add(self, step: int, value: float) -> Outlier | None:
        """Add the next number; return the outlier that it completes, if there is one."""
        values = self._values
        values.append(value)
        self._steps.append(step)
        if len(values) < self._least or values[-1 - self._after] == value:
            return None
        if not self._far(values[-1 - self._after], (values[-self._after], value)):
            return None  # the usual case
        others = list(values)
        one = others.pop(-1 - self._after)
        if not self._far(one, others):
            return None
        return Outlier(self._steps[0], one, min(others), max(others))

    def at_end(self, far: Far) -> Outlier | None:
        """The outlier among the last numbers, which fewer or none follow, because the sequence has ended.

        Args:
            far: Says whether one of them is far from the others.
        """
        values, steps = list(self._values), list(self._steps)
        for place in range(max(self._least - 1 - self._after, len(values) - self._after), len(values)):
            others = values[:place] + values[place + 1 :]
            if others and far(values[place], others):
                return Outlier(steps[place - len(values)], values[place], min(others), max(others))
        return None

    def clear(self) -> None:
        """Forget all numbers."""
        self._values.clear()
        self._steps.clear()


def times_above(times: float) -> Far:
    """Far is more than ``times`` the largest of the others."""
    return lambda one, others: one > times * max(others) > 0


def times_off(times: float, steady: float) -> Far:
    """Far is ``times`` above the others, or below them if these differ by less than a factor of ``steady``.

    Zero is not far: a part of a model, or an update, is often left out with it.
    """

    def far(one: float, others: Sequence[float]) -> bool:
        low, high = min(others), max(others)
        return one > times * high > 0 or (0 < one < low / times and high < steady * low)

    return far


def ranges_below(times: float) -> Far:
    """Far is more than ``times`` the range of the others below them."""

    def far(one: float, others: Sequence[float]) -> bool:
        low = min(others)
        return low - one > times * (max(others) - low)

    return far
