"""Windows of the newest values, and the robust statistics computed over them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import final


def spread(values: Iterable[float]) -> float:
    """Median absolute deviation, scaled to the standard deviation of a normal distribution.

    Example:
        >>> round(spread([1.0, 2.0, 3.0, 4.0, 100.0]), 3)
        1.483
    """
    values = list(values)
    centre = median(values)
    return 1.4826 * median(abs(value - centre) for value in values)


@final
class Window:
    """The newest accepted values, each with the step it was read at; what is rewound leaves it again."""

    __slots__ = ("_items",)

    def __init__(self, size: int) -> None:
        self._items: deque[tuple[int, float]] = deque(maxlen=size)

    def append(self, step: int, value: float) -> None:
        """Add a value; the oldest leaves a full window."""
        self._items.append((step, value))

    def rewind(self, step: int) -> None:
        """Forget what was read after ``step``."""
        while self._items and self._items[-1][0] > step:
            self._items.pop()

    def last(self, count: int) -> list[float]:
        """The newest ``count`` values, oldest first."""
        items = self._items
        return [items[i][1] for i in range(max(0, len(items) - count), len(items))]

    def step_before(self, step: int) -> int:
        """Step of the newest value that was read before ``step``; one less where none is known."""
        return next((read for read, _ in reversed(self._items) if read < step), step - 1)

    def values(self) -> list[float]:
        """All values, oldest first."""
        return [value for _, value in self._items]

    def __len__(self) -> int:
        return len(self._items)

    def state(self) -> list[list[float]]:
        """Plain lists for a checkpoint."""
        return [[step, value] for step, value in self._items]

    def load(self, state: Iterable[Iterable[float]]) -> None:
        """The inverse of :meth:`state`."""
        self._items.clear()
        self._items.extend((int(step), float(value)) for step, value in state)


def falling(values: list[float], noise: float, *, times: float = 0.5) -> bool:
    """Whether the newer half of some values lies below the older one, by ``times`` the error that noise leaves."""
    half = len(values) // 2
    return median(values[half:]) < median(values[:half]) - times * noise / math.sqrt(half)
