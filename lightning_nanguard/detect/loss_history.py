"""The past losses that :class:`DivergingLoss` compares the newest loss with."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any, final

from lightning_nanguard.detect.window import Window


@final
class LossHistory:
    """Keeps the newest accepted losses, the first one (that of the untrained model) and the best level.

    Args:
        size: How many losses are kept.
        level_readings: Newest losses whose median is the loss level.
    """

    def __init__(self, size: int, level_readings: int) -> None:
        self.accepted = Window(size)
        """The newest accepted losses."""
        self._level_readings = level_readings
        self._first_step: int | None = None
        self._best: float | None = None
        self.first: float | None = None
        """The first accepted loss of the run ("the untrained model's loss"), ``None`` before it."""
        self.since = 0
        """Losses accepted since the start or the last rollback."""

    @property
    def best(self) -> float | None:
        """The lowest loss level so far. Before the first level it is the first loss."""
        return self.first if self._best is None else self._best

    def accept(self, step: int, loss: float) -> None:
        """Add a healthy, finite loss."""
        if self._first_step is None:
            self.first, self._first_step = loss, step
        self.accepted.append(step, loss)
        self.since += 1
        # To save time, the median is computed only at a loss below the best level.
        if (self._best is None or loss < self._best) and len(self.accepted) >= self._level_readings:
            level = median(self.accepted.last(self._level_readings))
            if self._best is None or level < self._best:
                self._best = level

    def rewind(self, step: int) -> None:
        """Forget the losses accepted after ``step``."""
        self.accepted.rewind(step)
        self.since = 0
        if not len(self.accepted):
            self._best = None
        if self._first_step is not None and step < self._first_step:
            self._first_step = None  # the next accepted loss is the first one again

    def state(self) -> dict[str, Any]:
        """Plain containers for a checkpoint."""
        return {
            "losses": self.accepted.state(),
            "first": self.first,
            "first_step": self._first_step,
            "best": self._best,
            "since": self.since,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`; further keys are ignored."""
        self.accepted.load(state["losses"])
        self.first = state["first"]
        self._first_step = state["first_step"]
        self._best = state["best"]
        self.since = int(state["since"])
