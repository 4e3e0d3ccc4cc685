"""A window of the newest values that can be rewound."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import final


@final
class Window:
    """Holds the newest accepted values of a detector, each with its step, and can be rewound.

    Args:
        size: Number of values that are held. A full window drops the oldest.

    Example:
        >>> window = Window(2)
        >>> for step in range(3):
        ...     window.append(step, step / 10)
        >>> window.values()
        [0.1, 0.2]
        >>> window.rewind(1)
        >>> window.values()
        [0.1]
    """

    __slots__ = ("_items",)

    def __init__(self, size: int) -> None:
        self._items: deque[tuple[int, float]] = deque(maxlen=size)

    def append(self, step: int, value: float) -> None:
        """Add a value. A full window drops the oldest."""
        self._items.append((step, value))

    def rewind(self, step: int) -> None:
        """Forget the values after ``step``."""
        while self._items and self._items[-1][0] > step:
            self._items.pop()

    def last(self, count: int) -> list[float]:
        """The newest ``count`` values, oldest first."""
        items = self._items
        return [items[i][1] for i in range(max(0, len(items) - count), len(items))]

    def items(self) -> Iterator[tuple[int, float]]:
        """Steps and values, the newest first."""
        return reversed(self._items)

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
