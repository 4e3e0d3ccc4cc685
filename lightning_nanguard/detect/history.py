"""The newest readings of one optimizer."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from itertools import islice
from typing import Any, final

from lightning_nanguard.detect.trends import (
    climbs,
    has_burst,
    loss_falls,
    loss_level,
    loss_noise,
    usual_norm,
)
from lightning_nanguard.thresholds.detection import HistoryThresholds
from lightning_nanguard.types import Reading


@final
class ReadingHistory:
    """Keeps the newest healthy readings of one optimizer, and computes trends of its loss and gradient norm.

    Args:
        thresholds: How many readings are used, and what counts as a trend.
    """

    def __init__(self, thresholds: HistoryThresholds = HistoryThresholds()) -> None:
        self._thresholds = thresholds
        # Step, loss and norm of each reading. It is written in every step and rarely read.
        self._read: deque[tuple[int, float | None, float | None]] = deque(maxlen=self._thresholds.readings)
        self._best = math.inf
        self._until_level = self._thresholds.level_losses
        self._first_norm = 0.0
        self.first_step: int | None = None
        """The update of :attr:`first`."""
        self.first: float | None = None
        """Loss of the first healthy update of the run ("the untrained model's loss"), ``None`` before it."""

    def accept(self, reading: Reading) -> None:
        """Add a healthy reading."""
        loss = reading.loss if reading.loss_finite else None
        self._read.append((reading.step, loss, reading.grad_norm if reading.finite else None))
        if loss is not None:
            if self.first_step is None:
                self.first, self.first_step = loss, reading.step
                self._first_norm = reading.grad_norm if reading.finite and reading.grad_norm else 0.0
            self._until_level -= 1
            if self._until_level == 0:
                self._until_level = self._thresholds.level_losses
                level = self.level()
                self._best = min(self._best, self._best if level is None else level)

    def rewind(self, step: int) -> None:
        """Forget the readings after ``step``."""
        while self._read and self._read[-1][0] > step:
            self._read.pop()
        if self.first_step is not None and step < self.first_step:
            self.first_step = None  # the next accepted loss is the first one again

    def losses(self, count: int | None = None) -> list[float]:
        """The losses of the newest ``count`` readings (by default all that are kept), the oldest first."""
        return [loss for _, loss, _ in self._newest(count) if loss is not None]

    def _norms(self, count: int | None = None) -> list[float]:
        return [norm for _, _, norm in self._newest(count) if norm]

    def _newest(self, count: int | None) -> islice[tuple[int, float | None, float | None]]:
        return islice(self._read, 0 if count is None else max(0, len(self._read) - count), None)

    def loss_unit(self) -> float:
        """The unit of the loss: how far it has fallen so far, or its noise if that is larger.

        Differences of losses are divided by it, so that the scale of the losses, or a constant added to them, does not
        matter.
        """
        return max(self.learned(), self._noise(), 1e-12)

    def learned(self) -> float:
        """How far the loss has fallen so far; 0 if it has not."""
        return 0.0 if self.first is None else max(0.0, self.first - self._best)

    def _noise(self) -> float:
        return loss_noise(self.losses(self._thresholds.recent), self._thresholds)

    def level(self) -> float | None:
        """Mean of the newest losses without the highest. A median would miss a model that fails on some batches."""
        return loss_level(self.losses(self._thresholds.level_losses))

    def learning(self) -> bool:
        """Whether the loss is below the first one by more than its noise and by a share of the whole fall."""
        level, first = self.level(), self.first
        if level is None or first is None:
            return False
        own = self._thresholds
        return first - level > max(own.learning_noise * self._noise(), own.learning * self.learned())

    def falling(self) -> bool:
        """Whether the newest losses are clearly below the same number before them, or are too few to decide."""
        losses = self.losses(self._thresholds.recent)
        return len(losses) < self._thresholds.recent or loss_falls(losses, self._thresholds.falling)

    def usual_norm(self) -> float | None:
        """A low quantile of the healthy gradient norms above 0, or the minimum of a few; ``None`` with too few."""
        return usual_norm(self._norms(), self._first_norm, self._thresholds.usual_norm)

    def largest_norm(self) -> float | None:
        """The largest healthy gradient norm that is kept; ``None`` if there is none."""
        return max(self._norms(), default=None)

    def climbing(self) -> bool:
        """Whether the newest losses or norms lie above their usual range."""
        own, losses = self._thresholds.climb, self.losses(self._thresholds.recent)
        logs = [math.log(norm) for norm in self._norms(self._thresholds.recent)]
        return climbs(losses, own.loss * self.loss_unit(), own) or climbs(logs, math.log(own.norm), own)

    def burst(self) -> bool:
        """Whether a norm was suddenly far above those before it; under a high learning rate norms rise gradually."""
        return has_burst(self._norms(), self._first_norm, self._thresholds.burst)

    def state_dict(self) -> dict[str, Any]:
        """The history in plain containers."""
        return {
            "losses": [[step, loss] for step, loss, _ in self._read if loss is not None],
            "norms": [[step, norm] for step, _, norm in self._read if norm is not None],
            "best": self._best,
            "until_level": self._until_level,
            "first": self.first,
            "first_norm": self._first_norm,
            "first_step": self.first_step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._read.clear()
        losses, norms = dict(state["losses"]), dict(state["norms"])
        self._read.extend((step, losses.get(step), norms.get(step)) for step in sorted({*losses, *norms}))
        self._best = float(state.get("best", math.inf))
        self._until_level = int(state.get("until_level", self._thresholds.level_losses))
        self.first = state["first"]
        self._first_norm = float(state["first_norm"])
        self.first_step = state["first_step"]
