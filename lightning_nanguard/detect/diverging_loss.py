"""Suspects a run whose loss is finite but may not fall as far as it could."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from statistics import median
from typing import Any, final

from lightning_nanguard.detect.base import AT_ONCE, Detector, Limits
from lightning_nanguard.detect.window import Window
from lightning_nanguard.errors import require
from lightning_nanguard.thresholds.detection import DivergingLossThresholds
from lightning_nanguard.types import Fault, Reading


@final
class DivergingLoss(Detector):
    """Suspects a run whose loss is finite but may not fall as far as it could.

    A suspicion proves nothing. With ``act_on="evidence"`` the guard acts if a trial shows that the model learns much
    more at a lower rate. Otherwise it only gives advice. Losses are only compared with each other, so the result does
    not depend on their scale or on a constant added to them.

    * ``exploding_loss``: the newest losses are higher than the first one of the run;
    * ``collapsed``: they are nearer to the first loss than to the best level since;
    * ``stuck_loss``: they do not look bad, but a lower rate may do better. It leads to no advice.

    The first check is after ``patience`` updates, and further ones each time that the number of updates has doubled. A
    loss that rises far above its best level in between is suspected at once, and again only after twice as many
    updates. This leads to advice only if the weights show the cause. When a fit ends, the newest losses are checked
    once more, and a suspicion leads to advice.

    Args:
        factor: Has no effect, and is accepted for configurations written for version 0.1.0.
        patience: Number of updates after the start or the last rollback before the first check.
        warmup: Has no effect, like ``factor``.
        thresholds: Further thresholds, ``None`` for the defaults.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        factor: float | None = None,
        patience: int = 40,
        warmup: int | None = None,
        *,
        thresholds: DivergingLossThresholds | None = None,
    ) -> None:
        require(patience >= 8, self, "patience", patience, "an integer of at least 8")
        for name, value in (("factor", factor), ("warmup", warmup)):
            if value is not None:
                message = f"DivergingLoss({name}=…) has no effect any more: remove it from the configuration."
                warnings.warn(message, FutureWarning, stacklevel=2)
        self.patience = patience
        self.thresholds = own = thresholds or DivergingLossThresholds()
        self._losses = Window(max(own.readings, own.level_readings))
        self._first: float | None = None  # the first accepted loss of the run, that of the untrained model
        self._first_step: int | None = None
        self._best: float | None = None  # the lowest loss level so far, once there is a level
        self._since = 0  # losses accepted since the start or the last rollback
        self._next = patience
        self._suspected = False  # whether the newest losses are far above the best level
        self._early = patience  # updates before which no loss is suspected between two checks

    def check(self, reading: Reading) -> Fault | None:
        """The fault of this reading, or ``None``."""
        loss, first, best, updates = reading.loss, self._first, self._best_level(), self._since + 1
        due = updates >= self._next
        if loss is None or first is None or best is None or not (due or self._looks_in_between(loss)):
            return None
        return self._judged([*self._losses.last(self.thresholds.readings - 1), loss], first, best, updates, due=due)

    def at_end(self) -> Fault | None:
        """The fault of the newest losses, by the limits of a check that is due."""
        recent, first, best = self._losses.last(self.thresholds.readings), self._first, self._best_level()
        if first is None or best is None or self._since < max(self.patience, len(recent)):
            return None
        return self._judged(recent, first, best, self._since, due=True)

    def _judged(self, recent: list[float], first: float, best: float, updates: int, *, due: bool) -> Fault | None:
        # Without the lowest loss, because one easy batch is no progress.
        least, level = sorted(recent)[1], median(recent)
        if least > first:
            above = f"the newest losses were above {least:.4g}"
            message = f"after {updates} updates {above}, and the first loss of the run was {first:.4g}"
            return _suspicion("exploding_loss", level, message, doubtful=not due)
        if self._is_nearer_to_first(least):
            message = f"the loss had come down from {first:.4g} to {best:.4g} and was back at {level:.4g}"
            return _suspicion("collapsed", level, message, doubtful=not due)
        if not (due or least > self._level()):
            return None
        came = f"after {updates} updates the loss was {level:.4g}, and {first:.4g} at the start of the run"
        message = f"{came}; a lower learning rate may do better"
        return _suspicion("stuck_loss", level, message, doubtful=True)

    def _looks_in_between(self, loss: float) -> bool:
        """Whether a loss may be the one with which the run begins to lose what it has learned."""
        return loss > self._level() and not self._suspected and self._since >= self._early

    def _best_level(self) -> float | None:
        """The lowest loss level so far. Before the first level it is the first loss."""
        return self._first if self._best is None else self._best

    def _level(self) -> float:
        """The loss at which a run has lost so much of what it had learned that it is watched."""
        first, best = self._first, self._best_level()
        if first is None or best is None:
            return math.inf
        return best + self.thresholds.lost * (first - best)

    def _is_nearer_to_first(self, loss: float) -> bool:
        """Whether a loss is nearer to the first loss of the run than to the best level, or above the first."""
        first, best = self._first, self._best_level()
        return first is not None and best is not None and loss - best > first - loss

    def limits(self) -> Limits:
        """The loss far above the best level; no limit at all when the next check is due."""
        if self._since + AT_ONCE >= self._next:
            return Limits(-math.inf, math.inf)
        looks = not self._suspected and self._since + AT_ONCE >= self._early
        return Limits(self._level() if looks else math.inf, math.inf)

    def accept(self, reading: Reading) -> None:
        """Add a healthy loss to the history."""
        loss = reading.loss
        if loss is None or not math.isfinite(loss):
            return
        self._add(reading.step, loss)
        since, level = self._since, self._level()
        if since >= self._next:
            self._next = 2 * since
        if self._suspected or loss > level:
            before = self._suspected
            self._suspected = sorted(self._losses.last(self.thresholds.readings))[:2][-1] > level
            if self._suspected and not before and since > self._early:
                self._early = 2 * since

    def _add(self, step: int, loss: float) -> None:
        if self._first_step is None:
            self._first, self._first_step = loss, step
        self._losses.append(step, loss)
        self._since += 1
        # To save time, the median is computed only at a loss below the best level.
        enough = len(self._losses) >= self.thresholds.level_readings
        if enough and (self._best is None or loss < self._best):
            level = median(self._losses.last(self.thresholds.level_readings))
            self._best = level if self._best is None else min(level, self._best)

    def uneasy(self, reading: Reading) -> bool:
        """Whether this loss and the one before are nearer to the first loss than to the best level, or above it.

        The run may be diverging. One such loss is noise.
        """
        if reading.loss is None:
            return False
        before = (loss for step, loss in self._losses.items() if step < reading.step)
        return self._is_nearer_to_first(min(reading.loss, next(before, math.inf)))

    def rewind(self, step: int) -> None:
        """Forget the losses accepted after ``step``."""
        self._losses.rewind(step)
        self._since = 0
        if not len(self._losses):
            self._best = None
        if self._first_step is not None and step < self._first_step:
            self._first_step = None  # the next accepted loss is the first one again
        self._next = self._early = self.patience
        self._suspected = False

    def state_dict(self) -> dict[str, Any]:
        """The history in plain containers."""
        return {
            "losses": self._losses.state(),
            "first": self._first,
            "first_step": self._first_step,
            "best": self._best,
            "since": self._since,
            "next": self._next,
            "suspected": self._suspected,
            "early": self._early,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._losses.load(state["losses"])
        self._first = state["first"]
        self._first_step = state["first_step"]
        self._best = state["best"]
        self._since = int(state["since"])
        self._next = int(state.get("next", max(self.patience, self._since + 1)))
        self._suspected = bool(state.get("suspected", False))
        self._early = int(state.get("early", self.patience))


def _suspicion(kind: str, level: float, message: str, *, doubtful: bool) -> Fault:
    return Fault(kind, "learner", "loss", level, message, certain=False, doubtful=doubtful, proof="trial")
