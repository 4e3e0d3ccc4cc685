"""Whether a loss moves, from its level now and then: a comparison of two integers at every other update."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import final

from lightning_nanguard.detect.history import ReadingHistory
from lightning_nanguard.diagnosis.clues import Course

# Levels that one stretch of patience is divided into.
_PARTS = 8
# Losses of which a level is the median: at the start, and later.
_FEW = 8
_MANY = 32


@final
class Progress:
    """Looks at the level of the loss eight times in each stretch of ``patience`` updates.

    Args:
        patience: Updates over which a loss has to move.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._every = -(-patience // _PARTS)
        self._levels: deque[float] = deque(maxlen=_PARTS + 1)
        self._best: float | None = None
        self._first: float | None = None
        self._next = _FEW
        self._quiet_until = 0
        self._pause = patience

    @classmethod
    def of(cls, history: ReadingHistory) -> Progress:
        """The stretch of the newest losses alone."""
        losses = history.losses()
        size = max(1, len(losses) // (_PARTS + 1))
        made = cls(len(losses) or 1)
        made._levels.extend(median(losses[start : start + size]) for start in range(0, len(losses), size))
        made._best = min(made._levels, default=None)
        made._first = history.first
        return made

    def due(self, updates: int) -> bool:
        """Whether it is time to look again."""
        return updates >= self._next

    def see(self, updates: int, history: ReadingHistory) -> None:
        """Take the level of now."""
        self._next = updates + self._every
        losses = history.losses()[-_MANY:]
        if losses:
            level = median(losses)
            self._levels.append(level)
            # One loss of a small batch says little of the untrained model.
            self._first = level if self._first is None else self._first
            self._best = level if self._best is None else min(level, self._best)

    def course(self, updates: int, history: ReadingHistory) -> Course | None:
        """How the run has gone so far; ``None`` before the first reading."""
        if not self._levels or self._first is None or self._best is None:
            return None
        levels = [*self._levels]
        third = max(1, len(levels) // 3)
        steps = [abs(one - other) for one, other in zip(levels[1:], levels, strict=False)]
        return Course(
            updates=min(updates, self._patience),
            first=self._first,
            before=median(levels[:third]),
            now=median(levels[-third:]),
            spread=median(steps) if steps else 0.0,
            best=self._best,
            norm=history.usual_norm() or 0.0,
        )

    def stuck(self, updates: int, course: Course) -> bool:
        """Whether the loss has not moved for as long as the patience lasts; said ever more rarely."""
        if len(self._levels) <= _PARTS or updates < self._quiet_until or course.moves:
            return False
        self._quiet_until = updates + self._pause
        self._pause *= 2
        return True
