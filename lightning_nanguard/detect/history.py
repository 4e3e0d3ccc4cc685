"""The newest readings of one optimizer, and what they say about its loss and gradient norm."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from itertools import islice, takewhile
from statistics import fmean, median
from typing import Any, final

from lightning_nanguard.detect.window import falling, spread
from lightning_nanguard.types import Reading

# How many readings are looked back at.
_LOSSES = 64


_NORMS = 128


# So many losses are compared with as many before them.
_HALF = 16


# A burst is so many times the largest of at least so many norms before it, of which so many are looked at.
_BURST = 20.0


_CALM_BEFORE = 4


_BEFORE = 8


@final
class ReadingHistory:
    """Usual norms, loss level, and whether either was climbing."""

    def __init__(self) -> None:
        # Step, loss and norm of each reading; this is written in every step, and seldom read.
        self._read: deque[tuple[int, float | None, float | None]] = deque(maxlen=_NORMS)
        self._highest = -math.inf
        self._first_norm = 0.0
        self._first_step: int | None = None
        self.first: float | None = None

    def accept(self, reading: Reading) -> None:
        """Take a healthy reading."""
        loss = reading.loss if reading.loss_finite else None
        self._read.append((reading.step, loss, reading.grad_norm if reading.finite else None))
        if loss is not None:
            if self._first_step is None:
                self.first, self._first_step = loss, reading.step
                self._first_norm = reading.grad_norm if reading.finite and reading.grad_norm else 0.0
            if loss > self._highest:
                self._highest = loss

    def rewind(self, step: int) -> None:
        """Forget what was read after ``step``."""
        while self._read and self._read[-1][0] > step:
            self._read.pop()
        self._highest = max(self.losses(), default=-math.inf)
        if self._first_step is not None and step < self._first_step:
            self._first_step = None  # the next one is the untrained model's again

    def loss_unit(self) -> float:
        """The unit of the loss: the untrained model's loss, or its noise where that is larger."""
        values = self.losses(32)
        noise = spread(values) if len(values) >= 8 else 0.0
        return max(abs(self.first) if self.first is not None else 0.0, noise, 1e-12)

    def losses(self, count: int = _LOSSES) -> list[float]:
        """The losses of the newest ``count`` readings, the oldest first."""
        return [loss for _, loss, _ in islice(self._read, max(0, len(self._read) - count), None) if loss is not None]

    def _norms(self, count: int = _NORMS) -> list[float]:
        return [norm for _, _, norm in islice(self._read, max(0, len(self._read) - count), None) if norm]

    def level(self) -> float | None:
        """Mean of the newest losses but the highest: a ruined model may be right on more than half of its batches."""
        values = sorted(self.losses(8))
        return fmean(values[:-1] or values) if values else None

    def learning(self) -> bool:
        """Whether the loss is clearly below the untrained model's."""
        level = self.level()
        return level is not None and self.first is not None and level < self.first - 0.1 * self.loss_unit()

    def falling(self) -> bool:
        """Whether the newest sixteen losses lie clearly below the sixteen before, or are too few to tell."""
        values = self.losses(2 * _HALF)
        if len(values) < 2 * _HALF:
            return True
        earlier, later = values[:_HALF], values[_HALF:]
        noise = spread([loss - median(half) for half in (earlier, later) for loss in half])
        return falling(values, noise, times=2.0)

    def excursion(self) -> bool:
        """Whether the loss went far above the untrained model's since the start or the last rewind."""
        return self.first is not None and self._highest > self.first + self.loss_unit()

    def far_off(self) -> int:
        """For how many updates in a row, up to now, the loss has been far above the untrained model's."""
        if self.first is None:
            return 0
        limit = self.first + abs(self.first)
        return sum(1 for _ in takewhile(lambda loss: loss > limit, reversed(self.losses())))

    def usual_norm(self) -> float | None:
        """Lower quartile of the healthy gradient norms, of a few the least; ``None`` when fewer than four were seen.

        A run on its way out raises the median long before a norm counts as a fault. One whose units a rate has
        saturated has next to no gradient: a hundredth of the first norm is the least.
        """
        norms = sorted(self._norms())
        if len(norms) < 4:
            return None
        return max(norms[0] if len(norms) < 20 else norms[len(norms) // 4], 0.01 * self._first_norm)

    def climbing(self) -> bool:
        """Whether losses or norms had left their usual range just before now, upwards."""
        return _left(self.losses(32), 0.5 * self.loss_unit()) or _left(
            [math.log(norm) for norm in self._norms(32)], math.log(5.0)
        )

    def burst(self) -> bool:
        """Whether a norm came out of nothing: far above all of several before it, where a rate lets them climb."""
        norms = self._norms()
        return any(
            norms[i] > max(self._first_norm, _BURST * max(norms[max(0, i - _BEFORE) : i]))
            for i in range(_CALM_BEFORE, len(norms))
        )

    def state_dict(self) -> dict[str, Any]:
        """The history in plain containers."""
        return {
            "losses": [[step, loss] for step, loss, _ in self._read if loss is not None],
            "norms": [[step, norm] for step, _, norm in self._read if norm is not None],
            "highest": self._highest,
            "first": self.first,
            "first_norm": self._first_norm,
            "first_step": self._first_step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._read.clear()
        losses, norms = dict(state["losses"]), dict(state["norms"])
        self._read.extend((step, losses.get(step), norms.get(step)) for step in sorted({*losses, *norms}))
        self._highest = float(state["highest"])
        self.first = state["first"]
        self._first_norm = float(state["first_norm"])
        self._first_step = state["first_step"]


def _left(values: list[float], least: float) -> bool:
    if len(values) < 3:
        return False
    before, newest = values[:-2] if len(values) < 8 else values[:-3], values[-2:]
    return min(newest) > median(before) + max(4 * spread(before), least)
