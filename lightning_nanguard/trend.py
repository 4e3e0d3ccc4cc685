"""Short history of one stream of readings that the evidence is drawn from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import takewhile
from statistics import median
from typing import Any, final

from lightning_nanguard.detectors import Window, spread
from lightning_nanguard.events import Reading


@final
class Trend:
    """Usual norms, loss level, and whether either was climbing."""

    def __init__(self) -> None:
        self._losses = Window(64)
        self._norms = Window(128)
        self._highest = -math.inf
        self.first: float | None = None

    def accept(self, reading: Reading) -> None:
        """Take a healthy reading."""
        if reading.loss is not None and math.isfinite(reading.loss):
            if self.first is None:
                self.first = reading.loss
            self._highest = max(self._highest, reading.loss)
            self._losses.append(reading.step, reading.loss)
        if reading.grad_norm is not None and reading.finite:
            self._norms.append(reading.step, reading.grad_norm)

    def rewind(self, step: int) -> None:
        """Forget what was read after ``step``."""
        self._losses.rewind(step)
        self._norms.rewind(step)
        self._highest = max(self._losses.values(), default=-math.inf)

    def scale(self) -> float:
        """The loss's own scale: the untrained model's loss, or its noise where that is larger."""
        values = self._losses.last(32)
        noise = spread(values) if len(values) >= 8 else 0.0
        return max(abs(self.first) if self.first is not None else 0.0, noise, 1e-12)

    def losses(self) -> list[float]:
        """The newest losses, at most 64, the oldest first."""
        return list(self._losses.values())

    def level(self) -> float | None:
        """Median of the newest losses."""
        values = self._losses.last(8)
        return median(values) if values else None

    def learning(self) -> bool:
        """Whether the loss is clearly below the untrained model's."""
        level = self.level()
        return level is not None and self.first is not None and level < self.first - 0.1 * self.scale()

    def excursion(self) -> bool:
        """Whether the loss went far above the untrained model's since the start or the last rewind."""
        return self.first is not None and self._highest > self.first + self.scale()

    def far_off(self) -> int:
        """For how many updates in a row, up to now, the loss has been far above the untrained model's."""
        if self.first is None:
            return 0
        limit = self.first + abs(self.first)
        return sum(1 for _ in takewhile(lambda loss: loss > limit, reversed(self._losses.values())))

    def usual_norm(self) -> float | None:
        """Lower quartile of the healthy gradient norms, of a few the least; ``None`` when fewer than four were seen.

        A run on its way out raises the median long before a norm counts as a fault.
        """
        norms = sorted(norm for norm in self._norms.values() if norm > 0)
        if len(norms) < 4:
            return None
        return norms[0] if len(norms) < 20 else norms[len(norms) // 4]

    def climbing(self) -> bool:
        """Whether losses or norms had left their usual range just before now, upwards."""
        return _left(self._losses.last(32), 0.5 * self.scale()) or _left(
            [math.log(norm) for norm in self._norms.last(32) if norm > 0], math.log(5.0)
        )

    def state_dict(self) -> dict[str, Any]:
        """The history in plain containers."""
        return {
            "losses": self._losses.state(),
            "norms": self._norms.state(),
            "highest": self._highest,
            "first": self.first,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._losses.load(state["losses"])
        self._norms.load(state["norms"])
        self._highest = float(state["highest"])
        self.first = state["first"]


def _left(values: list[float], least: float) -> bool:
    if len(values) < 3:
        return False
    before, newest = values[:-2] if len(values) < 8 else values[:-3], values[-2:]
    return min(newest) > median(before) + max(4 * spread(before), least)
