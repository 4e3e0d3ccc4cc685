"""Detects a finite loss that diverged and did not recover."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, final

from lightning_nanguard.detect.base import AT_ONCE, Detector, Limits
from lightning_nanguard.detect.dismissals import Dismissals
from lightning_nanguard.detect.loss_history import LossHistory
from lightning_nanguard.detect.loss_shapes import LOSS_SHAPES
from lightning_nanguard.detect.loss_shapes.harmless import harmless_below
from lightning_nanguard.detect.loss_shapes.overshoot import Rise, overshoot, rises
from lightning_nanguard.detect.loss_shapes.view import LossView, loss_unit
from lightning_nanguard.errors import require
from lightning_nanguard.thresholds.detection import DivergingLossThresholds
from lightning_nanguard.types import Fault, Reading

_OVERSHOOT = "overshoot"


@final
class DivergingLoss(Detector):
    """A finite loss that diverged and did not recover, or never fell below the untrained model's.

    "The untrained model's loss" is that of the first healthy update.

    Five shapes, judged on medians and trimmed means so that noise and heavy tails are no fault:

    * ``exploding_loss``: far above the untrained model's loss (``factor`` times its size) and not falling;
    * ``collapsed``: having learned, the loss is back at the untrained level and stays there;
    * ``unsteady_loss``: having learned, it swings, and is on average above the untrained level;
    * ``stuck_loss``: early in training the loss stays above the untrained model's;
    * ``overshoot``: an update took the loss far above the untrained model's some readings ago, even if it is low now.

    All are suspicions: before anything is changed, the guard compares the loss of the same batch under the last good
    weights, or looks at how far the weights have grown.

    Args:
        factor: How many times the size of the first loss counts as far above.
        patience: Readings over which a settled loss is judged.
        warmup: Accepted readings before a finite loss can be a fault.
        thresholds: Further thresholds, ``None`` for the defaults.

    Raises:
        ValueError: When an argument is out of its range.
    """

    def __init__(
        self,
        factor: float = 10.0,
        patience: int = 40,
        warmup: int = 3,
        *,
        thresholds: DivergingLossThresholds | None = None,
    ) -> None:
        require(factor > 1, self, "factor", factor, "a number above 1")
        require(patience >= 8, self, "patience", patience, "an integer of at least 8")
        require(warmup >= 1, self, "warmup", warmup, "an integer of at least 1")
        self.factor = factor
        self.patience = patience
        self.warmup = warmup
        self.thresholds = own = thresholds or DivergingLossThresholds()
        self._history = LossHistory(max(own.window, 2 * patience), own.level_readings)
        self._dismissed = Dismissals(own.dismissal)
        self._rise: Rise | None = None

    @property
    def first(self) -> float | None:
        """The loss of the untrained model."""
        return self._history.first

    def check(self, reading: Reading) -> Fault | None:
        """The fault of this reading, or ``None``."""
        loss, first = reading.loss, self._history.first
        if loss is None or first is None or len(self._history.accepted) < self.warmup:
            return None
        if self._rise is not None:
            fault = overshoot(self._view(loss, first), self._rise)
            if fault is not None:
                return fault
        # Without a first loss above 0 in size there is no unit to measure differences in.
        if first == 0 or loss < self._harmless_below(first, self._history.since):
            return None
        view = self._view(loss, first)
        lately = self._lately(loss)
        for kind, shape in LOSS_SHAPES.items():
            if not self._dismissed.silences(kind, reading.step, lately):
                fault = shape(view, self.thresholds)
                if fault is not None:
                    return fault
        return None

    def limits(self) -> Limits:
        """The loss below which no shape applies in the next :data:`AT_ONCE` readings; any gradient norm is allowed."""
        first, since = self._history.first, self._history.since
        if first is None or len(self._history.accepted) < self.warmup or self._rise is not None:
            return Limits(-math.inf, math.inf)
        return Limits(min(self._harmless_below(first, since), self._harmless_below(first, since + AT_ONCE)), math.inf)

    def _view(self, loss: float, first: float) -> LossView:
        history = self._history
        return LossView(
            loss=loss,
            accepted=history.accepted,
            first=first,
            unit=loss_unit(first),
            best=first if history.best is None else history.best,
            highest=history.highest,
            since=history.since,
            factor=self.factor,
            patience=self.patience,
        )

    def _harmless_below(self, first: float, since: int) -> float:
        best = first if self._history.best is None else self._history.best
        return harmless_below(first, best, since, self.patience, self.thresholds)

    def _lately(self, loss: float) -> float:
        # The lowest of the newest losses, so that a single outlier does not count.
        return min([*self._history.accepted.last(self.thresholds.recent_readings - 1), loss])

    def accept(self, reading: Reading) -> None:
        """Take a healthy loss into the history."""
        loss, step = reading.loss, reading.step
        if loss is None or not math.isfinite(loss):
            return
        self._history.accept(step, loss)
        first, own = self._history.first, self.thresholds.overshoot
        if self._rise is not None:
            if loss > self._rise.height:
                self._rise = replace(self._rise, height=loss)
        elif (
            first is not None
            and loss > first
            and rises(loss, first, own)
            and not self._dismissed.silences(_OVERSHOOT, step, loss)
        ):
            self._rise = Rise(self._history.accepted.step_before(step), loss, self._history.since - 1 + own.after)

    def uneasy(self, reading: Reading) -> bool:
        """Whether the loss is clearly above the untrained model's or rising back to it: it may be diverging."""
        loss, first, best = reading.loss, self._history.first, self._history.best
        if loss is None or first is None or best is None:
            return False
        own, unit, learned = self.thresholds, loss_unit(first), first - best
        way_back = learned > own.learned * unit and loss > first - own.uneasy_lost * learned
        return way_back or loss > first + own.uneasy_above * unit

    def undecided(self) -> bool:
        """Whether the loss rose and the weights have not been looked at since."""
        return self._rise is not None

    def dismiss(self, reading: Reading) -> None:
        """The suspicion was a false alarm: do not raise it again for a while."""
        fault, loss = self.check(reading), reading.loss
        if fault is None or loss is None:
            return
        if fault.since is None or self._rise is None:
            self._dismissed.add(fault.kind, reading.step, self._lately(loss))
        else:
            self._dismissed.add(fault.kind, reading.step, self._rise.height, self.thresholds.overshoot.longest_pause)
            self._rise = None

    def rewind(self, step: int) -> None:
        """Forget what was accepted after ``step``."""
        self._history.rewind(step)
        self._dismissed.clear()
        if self._rise is not None:
            # A restored state from after the rise may be ruined as well, so the rise has still to be looked into.
            after = self._rise.step < step
            self._rise = replace(self._rise, due=self.thresholds.overshoot.after) if after else None

    def state_dict(self) -> dict[str, Any]:
        """The history in plain containers."""
        rise = self._rise
        return {
            **self._history.state(),
            "dismissed": self._dismissed.state(),
            "rise": [None, 0.0, 0] if rise is None else [rise.step, rise.height, rise.due],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._history.load(state)
        self._dismissed.load(state.get("dismissed", {}))
        step, height, due = state.get("rise", (None, 0.0, 0))
        self._rise = None if step is None else Rise(step, height, due)
