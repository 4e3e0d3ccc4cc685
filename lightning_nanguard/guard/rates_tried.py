"""Remembers the rates that the newest trial tested, to find out whether another trial would test a new one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

from lightning_nanguard.guard.context import GuardContext


@final
class RatesTried:
    """The learning rates of the newest trial, compared with those that the run has had since.

    Args:
        context: Objects and settings that the parts of the guard share.
    """

    def __init__(self, context: GuardContext) -> None:
        self._context = context
        self._changed = context.thresholds.trial.changed
        # Of the newest trial: its first update, the ratio of the multiplier, and the highest rate so far.
        self._newest: tuple[int, float, float] | None = None

    def note(self) -> None:
        """A trial begins."""
        self._newest = self._context.state.step, self._context.rate.ratio(), self._survived()

    def note_arm(self, factor: float) -> None:
        """The run will go on at a factor on its rate. The trial has tested this rate, and a lower one is not better."""
        if self._newest is not None:
            _, ratio, highest = self._newest
            self._newest = self._context.state.step, ratio * factor, highest * factor

    def forget(self) -> None:
        """The newest trial has no result, so that the next one is due at any rate."""
        self._newest = None

    def is_new(self) -> bool:
        """Whether the rate is new since the newest trial: the guard has cut it, or it is far above all rates before."""
        if self._newest is None:
            return True
        step, ratio, survived = self._newest
        highest = max((one for since, one in self._context.state.rates if since > step), default=0.0)
        now = self._context.rate.ratio()
        cut = now < ratio and not math.isclose(now, ratio)
        return cut or highest > survived <= highest / self._changed

    def has_fallen(self, since: int) -> bool:
        """Whether the rate was far higher since an update than it is now, as after a peak of a schedule."""
        highest, rate = self._context.state.highest_rate(since), self._context.rate.first()
        return rate is not None and highest > 0 and highest >= self._changed * rate

    def _survived(self) -> float:
        """The highest rate since the last rollback. A trial tests what the run has become, and so all these rates."""
        state, rate, newest = self._context.state, self._context.rate, self._newest
        if rate.ratio() < 1:
            return rate.first() or 0.0  # a higher one has failed
        first = 0 if state.healthy_since_restore is None else state.step - state.healthy_since_restore + 1
        before = 0.0 if newest is None or state.rolled_back_since(newest[0]) else newest[2]
        return max(before, state.highest_rate(first))

    def state_dict(self) -> dict[str, Any]:
        """The state in plain containers."""
        return {"newest": self._newest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`. The state may be empty."""
        newest = state.get("newest")
        self._newest = None if newest is None else (int(newest[0]), float(newest[1]), float(newest[2]))
