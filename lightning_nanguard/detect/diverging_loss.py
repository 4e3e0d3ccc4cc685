"""Detects a finite loss that has left for good."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import fmean, median
from types import MappingProxyType
from typing import Any, final

from lightning_nanguard.detect.base import AT_ONCE, Detector, Limits
from lightning_nanguard.detect.window import Window, falling, spread
from lightning_nanguard.errors import require
from lightning_nanguard.types import Fault, Reading

# A rise is looked into at least once in so many readings: that costs some norms, and runs no batch again.
_LONGEST_LOOK = 400


@final
class _Dismissed:
    """Suspicions that were none: each is not raised again for a while, four times as long each time.

    A run that looks suspicious for good reasons must not be looked into for ever; but one suspicion says nothing of
    another, nor of one of the same kind where the loss is many times as high.
    """

    _cooldown = 25
    _far_higher = 10.0

    def __init__(self, state: Mapping[str, Iterable[float]] = MappingProxyType({})) -> None:
        # By kind: until which step, for how long the next time, and the loss.
        self._by_kind: dict[str, tuple[float, ...]] = {kind: tuple(values) for kind, values in state.items()}

    def silences(self, kind: str, step: int, loss: float) -> bool:
        """Whether a suspicion is not to be raised at this step."""
        until, _, then = self._by_kind.get(kind, (-math.inf, 0, 0))
        return step < until and not loss > self._far_higher * abs(then)

    def add(self, kind: str, step: int, loss: float, longest: int = 3200) -> None:
        """One was looked into and was none; ``longest`` is the longest while."""
        _, pause, _ = self._by_kind.get(kind, (0, self._cooldown, 0))
        self._by_kind[kind] = (step + pause, min(4 * pause, longest), loss)

    def state(self) -> dict[str, list[float]]:
        """Plain containers."""
        return {kind: list(values) for kind, values in self._by_kind.items()}


@final
class DivergingLoss(Detector):
    """A finite loss that left for good: it exploded, fell back to chance, or never got below the untrained model's.

    Five shapes, judged on medians and trimmed means so that noise and heavy tails are no fault:

    * ``exploding_loss``: far above the untrained model's loss (``factor`` times its scale) and not falling;
    * ``collapsed``: having learned, the loss is back at the untrained level and stays there;
    * ``unsteady_loss``: having learned, it swings, and is on average above the untrained level;
    * ``stuck_loss``: early in training the loss stays above the untrained model's;
    * ``overshoot``: an update took the loss far above the untrained model's some readings ago, wherever it is now.

    All are suspicions: before anything is changed, the engine compares the loss of the same batch under the last good
    weights, or looks at how far the weights have grown.

    Args:
        factor: How many times the scale of the first loss counts as far above.
        patience: Readings over which a settled loss is judged.
        warmup: Accepted readings before a finite loss can be a fault.

    Raises:
        ValueError: When an argument is out of its range.
    """

    _short = 8
    _lost = 12
    # So many readings behind one that was far up the weights are looked at.
    _behind = 12
    # A model that has not learned by then is hard, not ruined: ruin by a rate shows early.
    _early = 1000
    # Times the untrained model's loss by which a loss with a floor near 0 can fall at most, and some more.
    _bounded = 3.0
    # Share of the untrained model's loss down to which a loss at rest is looked into.
    _at_rest = 0.7

    def __init__(self, factor: float = 10.0, patience: int = 40, warmup: int = 3) -> None:
        require(factor > 1, self, "factor", factor, "a number above 1")
        require(patience >= 8, self, "patience", patience, "an integer of at least 8")
        require(warmup >= 1, self, "warmup", warmup, "an integer of at least 1")
        self.factor = factor
        self.patience = patience
        self.warmup = warmup
        self._losses = Window(max(64, 2 * patience))
        self._first: float | None = None
        self._first_step: int | None = None
        self._best: float | None = None
        self._highest: float | None = None
        self._since = 0
        self._dismissed = _Dismissed()
        # Step of the last reading before one that was far up, how far up it went, and when to look at the weights.
        self._rise: int | None = None
        self._height = 0.0
        self._looks_at = 0

    @property
    def first(self) -> float | None:
        """The loss of the untrained model."""
        return self._first

    def check(self, reading: Reading) -> Fault | None:
        """The fault of this reading, or ``None``."""
        loss = reading.loss
        if loss is None or self._first is None or len(self._losses) < self.warmup:
            return None
        if self._rise is not None and self._since >= self._looks_at:
            return self._overshoot(self._rise, loss)
        # One that began at 0 has no scale.
        if self._first == 0 or loss < self._low(self._since):
            return None
        scale = self._scale()
        lately = self._lately(loss)
        for kind, shape in (
            ("exploding_loss", self._exploding),
            ("collapsed", self._collapsed),
            ("unsteady_loss", self._unsteady),
            ("stuck_loss", self._stuck),
        ):
            if not self._dismissed.silences(kind, reading.step, lately):
                fault = shape(loss, scale)
                if fault is not None:
                    return fault
        return None

    def limits(self) -> Limits:
        """What :meth:`check` does not look at, now or a few readings later."""
        if self._first is None or len(self._losses) < self.warmup or self._rise is not None:
            return Limits(-math.inf, math.inf)
        return Limits(min(self._low(self._since), self._low(self._since + AT_ONCE)), math.inf)

    def _low(self, since: int) -> float:
        # Well below the untrained level, or nearer to its best than to that level, a loss is none of the shapes.
        assert self._first is not None
        best = self._first if self._best is None else self._best
        low = min(self._first - 0.3 * self._scale(), 0.5 * (best + self._first))
        if self.patience <= since <= self._early:
            low = min(low, self._first - self._at_rest * self._scale())
        return low

    def _scale(self) -> float:
        assert self._first is not None
        return max(abs(self._first), 1e-12)

    def _lately(self, loss: float) -> float:
        # A single outlier is no level.
        return min([*self._losses.last(2), loss])

    def _overshoot(self, rise: int, loss: float) -> Fault:
        message = f"the loss rose to {self._height:.4g} after step {rise}; the untrained model's was {self._first:.4g}"
        return Fault("overshoot", "learner", "loss", loss, message, since=rise)

    def _exploding(self, loss: float, scale: float) -> Fault | None:
        assert self._first is not None
        far = self._first + self.factor * scale
        if loss <= far:
            return None
        recent = [*self._losses.last(self._short - 1), loss]
        much_too_far = self._first + 100 * self.factor * scale
        last = recent[-3:]
        at_once = len(last) == 3 and min(last) > much_too_far and last[-1] >= 0.5 * last[0]
        half = len(recent) // 2
        steadily = (
            len(recent) == self._short and median(recent) > far and median(recent[half:]) > 0.7 * median(recent[:half])
        )
        if not (at_once or steadily):
            return None
        return Fault(
            "exploding_loss",
            "learner",
            "loss",
            loss,
            f"the loss is {loss:.4g}; the untrained model's was {self._first:.4g}",
        )

    def _collapsed(self, loss: float, scale: float) -> Fault | None:
        assert self._first is not None
        best = self._first if self._best is None else self._best
        learned = self._first - best
        if learned <= 0.3 * scale or len(self._losses) < self._lost:
            return None
        recent = [*self._losses.last(self.patience - 1), loss]
        noise = spread(recent) if len(recent) >= self._short else 0.0
        # Above the untrained level at every one of some readings and not about to return, or settled near it.
        last = recent[-self._lost :]
        earlier, later = median(last[: self._lost // 2]), median(last[self._lost // 2 :])
        above = len(last) == self._lost and min(last) > self._first - 0.1 * learned
        gone = above and later - best > 0.7 * (earlier - best)
        settled = len(recent) == self.patience and not falling(recent, noise)
        level = median(last if gone else recent)
        # A loss that fell by many times the untrained one's size (a policy gradient's, which begins at 0) is no measure
        # of progress until it is back there altogether.
        measures = learned <= self._bounded * scale
        back = settled and measures and level > best + 0.6 * learned and level > best + 4 * noise
        if not (gone or back):
            return None
        return Fault(
            "collapsed",
            "learner",
            "loss",
            level,
            f"the loss had come down from {self._first:.4g} to {best:.4g} and is back at {level:.4g}",
        )

    def _unsteady(self, loss: float, scale: float) -> Fault | None:
        # Right on some batches and far off on others: no median tells it, the mean of all but the highest tenth does.
        assert self._first is not None
        if self._best is None or self._first - self._best <= 0.3 * scale:
            return None
        recent = [*self._losses.last(self.patience - 1), loss]
        if len(recent) < self.patience:
            return None
        usual = fmean(sorted(recent)[: -self.patience // 10])
        if usual <= self._first + scale:
            return None
        message = f"having learned, the loss swings around {usual:.4g}; the untrained model's was {self._first:.4g}"
        return Fault("unsteady_loss", "learner", "loss", usual, message)

    def _stuck(self, loss: float, scale: float) -> Fault | None:
        assert self._first is not None
        best = self._first if self._best is None else self._best
        # What stands still can be looked at now and then.
        if self._since > self._early or self._since < 12 or self._since % 4:
            return None
        recent = [*self._losses.last(15), loss]
        if len(recent) < 12:
            return None
        level = median(recent)
        learned = self._first - best > 0.3 * scale
        high = not learned and min(recent) > self._first + 0.5 * scale
        settled = not learned and self._since >= self.patience and level > self._first - 0.3 * scale
        if not (high or settled or self._plateau(loss, scale)):
            return None
        climb = f" and a climb to {self._highest:.4g}" if self._highest is not None else ""
        return Fault(
            "stuck_loss",
            "learner",
            "loss",
            level,
            f"after {self._since} updates{climb} the loss is {level:.4g}, no better than the untrained model's "
            f"{self._first:.4g}",
        )

    def _plateau(self, loss: float, scale: float) -> bool:
        # An untrained model's loss may lie above that of chance, where a ruined one comes to rest.
        assert self._first is not None
        best = self._first if self._best is None else self._best
        if self._since < self.patience or best < self._first - self._at_rest * scale:
            return False
        recent = [*self._losses.last(self.patience - 1), loss]
        return not falling(recent, spread(recent))

    def accept(self, reading: Reading) -> None:
        """Take a healthy loss into the history."""
        loss = reading.loss
        if loss is None or not math.isfinite(loss):
            return
        if self._first_step is None:
            self._first, self._first_step = loss, reading.step
        self._losses.append(reading.step, loss)
        self._since += 1
        # The median of the newest hardly falls below the best one while no loss does.
        if (self._best is None or loss < self._best) and len(self._losses) >= self._short:
            level = median(self._losses.last(self._short))
            if self._best is None or level < self._best:
                self._best = level
        if self._highest is None or loss > self._highest:
            self._highest = loss
        # One that began at 0 has no scale.
        far_up = bool(self._first) and self._first is not None and loss > self._first + 2 * self._scale()
        if self._rise is not None:
            self._height = max(self._height, loss)
        elif far_up and not self._dismissed.silences("overshoot", reading.step, loss):
            self._rise, self._height = self._losses.step_before(reading.step), loss
            self._looks_at = self._since - 1 + self._behind

    def uneasy(self, reading: Reading) -> bool:
        """A loss clearly above the untrained model's, or on its way back there: the learner may be leaving."""
        if reading.loss is None or self._first is None:
            return False
        learned = 0.0 if self._best is None else self._first - self._best
        way_back = learned > 0.3 * self._scale() and reading.loss > self._first - 0.5 * learned
        return way_back or reading.loss > self._first + self._scale()

    def undecided(self) -> bool:
        """A rise behind which the weights have not been looked at."""
        return self._rise is not None

    def dismiss(self, reading: Reading) -> None:
        """The suspicion was looked into and was none: stay quiet for a while."""
        fault, loss = self.check(reading), reading.loss
        if fault is None or loss is None:
            return
        if fault.kind == "overshoot":
            self._rise = None
            self._dismissed.add(fault.kind, reading.step, self._height, longest=_LONGEST_LOOK)
        else:
            self._dismissed.add(fault.kind, reading.step, self._lately(loss))

    def rewind(self, step: int) -> None:
        """Forget what was accepted after ``step``."""
        self._losses.rewind(step)
        self._highest = None
        self._since = 0
        self._dismissed = _Dismissed()
        if self._rise is not None and self._rise < step:
            self._looks_at = self._behind  # the state gone back to is from behind the rise
        else:
            self._rise = None
        if not len(self._losses):
            self._best = None
        if self._first_step is not None and step < self._first_step:
            self._first_step = None  # the next one is the untrained model's again

    def state_dict(self) -> dict[str, Any]:
        """The history in plain containers."""
        return {
            "losses": self._losses.state(),
            "first": self._first,
            "first_step": self._first_step,
            "best": self._best,
            "highest": self._highest,
            "dismissed": self._dismissed.state(),
            "since": self._since,
            "rise": [self._rise, self._height, self._looks_at],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._losses.load(state["losses"])
        self._first = state["first"]
        self._first_step = state["first_step"]
        self._best = state["best"]
        self._highest = state["highest"]
        self._dismissed = _Dismissed(state.get("dismissed", {}))
        self._since = int(state["since"])
        self._rise, self._height, self._looks_at = state.get("rise", (None, 0.0, 0))
