"""What lasts of an intervention, a lower rate and clipping, and how it comes to an end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, final

from lightning_nanguard.act.base import Remedy
from lightning_nanguard.act.clip_gradients import ClipGradients
from lightning_nanguard.act.clipping import Clipper
from lightning_nanguard.act.learning_rate import LearningRate
from lightning_nanguard.act.reduce_lr import ReduceLR
from lightning_nanguard.decide.policy import Policy
from lightning_nanguard.detect.history import ReadingHistory
from lightning_nanguard.detect.monitors import Monitors
from lightning_nanguard.guard.recorder import InterventionRecorder
from lightning_nanguard.guard.rehearsal import Rehearsal, Reviews
from lightning_nanguard.guard.state import GuardState
from lightning_nanguard.types import Evidence, Fault, Scale

_HEALTHY = Fault("healthy_stretch", "learner", "", None, "a long healthy stretch")


_STILL_HIGH = Fault(
    "rate_still_high", "learner", "", None, "at this rate a few batches are learned at the expense of others"
)


@final
class Recovery:
    """Cuts the rate and turns clipping on, reviews a cut, and gives back after a healthy stretch.

    Args:
        rate: The learning rate's multiplier.
        reduce: How the user wants the rate to be cut and given back.
        clip: How the user wants gradients to be clipped.
        standing: Where the run stands.
        policy: Decides when something is given back.
        monitors: Know whether the run learns.
        rehearsal: Tries rates out.
        account: Records what was done.
        may_lower: Whether the user lets the rate be cut at all.
    """

    # So often in a row a review lowers the rate: each time there is less to say that it must.
    _most_lowered = 3

    def __init__(
        self,
        rate: LearningRate,
        reduce: Remedy,
        clip: Remedy,
        standing: GuardState,
        policy: Policy,
        monitors: Monitors,
        rehearsal: Rehearsal,
        account: InterventionRecorder,
        *,
        may_lower: bool,
    ) -> None:
        self._rate = rate
        self._reduce = reduce
        self._clip = clip
        self._standing = standing
        self._policy = policy
        self._monitors = monitors
        self._rehearsal = rehearsal
        self._account = account
        self._may_lower = may_lower
        self._lowered = 0
        self._reviews = Reviews()
        self._clipping_since = 0
        self.clipper = Clipper()

    def scale(self, factor: float, min_lr: float, *, limit: bool = False) -> None:
        """Multiply the learning rate, or with ``limit`` allow no larger one than results."""
        rate = self._rate
        if limit or rate.ratio() < rate.multiplier:
            rate.set_multiplier(rate.multiplier, min_lr=min_lr, max_lr=rate.effective()[0] * factor)
        else:
            rate.set_multiplier(min(1.0, rate.multiplier * factor), min_lr=min_lr, max_lr=rate.max_lr)
        self._reviews.begin(self._standing.healthy_steps)

    def clip(self, value: float, algorithm: Literal["norm", "value"]) -> None:
        """Clip from now on; ``inf`` ends it."""
        self.clipper.set(value, algorithm)
        self._clipping_since = self._standing.healthy_steps
        # Clipping alone may have been too little.
        self._reviews.begin(self._standing.healthy_steps)

    def give_back(self) -> None:
        """After a healthy update: raise the rate, review it, end clipping, where it is time."""
        if not self._rate.is_on() and self.clipper.value is None:
            return
        standing, reduce = self._standing, self._reduce
        standing.restored = None
        before = self._rate.effective() if self._rate.is_on() else []
        ratio = self._rate.ratio() if before else 1.0
        if ratio < 1.0 and isinstance(reduce, ReduceLR):
            plan, standing.policy = self._policy.give_back(
                Evidence(standing.step, healthy_steps=standing.healthy_steps, multiplier=ratio),
                standing.policy,
                scheduled_lr=self._rate.scheduled()[0],
                factor=reduce.factor,
                after=reduce.recover_after,
                learning=self._monitors.learning(),
            )
            for step in plan:
                if isinstance(step, Scale) and reduce.rehearse and self._rehearsal.harmful(step.factor):
                    standing.policy = replace(standing.policy, proven_rate=0.0)
                elif isinstance(step, Scale):
                    self._raise_rate(ratio * step.factor, step, reduce.min_lr)
                    self._account.record(_HEALTHY, "", ("give back",), before)
                    self._reviews.begin(standing.healthy_steps)
        if isinstance(reduce, ReduceLR):
            self._review(reduce)
        self._end_clipping()

    def _review(self, reduce: ReduceLR) -> None:
        # The cut was chosen on next to no evidence; now there is more.
        standing = self._standing
        if not (reduce.rehearse and self._reviews.due(standing.healthy_steps)):
            return
        history = self._monitors.history(0) or ReadingHistory()
        before, ratio = self._rate.effective(), self._rate.ratio()
        may_rise = ratio <= 0.5 and 4 * before[0] < standing.policy.bad_rate
        # A loss that falls does so at this rate, and one that never fell says nothing of it.
        rests = history.learning() and not history.falling()
        rests &= self._may_lower and self._lowered < self._most_lowered and before[0] > reduce.min_lr
        if not (may_rise or rests):
            return
        factor = self._rehearsal.review(history.first if rests else None, at_most=2.0 if may_rise else 1.0)
        if factor > 1:
            self._raise_rate(ratio * factor, Scale(factor), reduce.min_lr)
            self._reviews.begin(standing.healthy_steps)
            standing.policy = replace(standing.policy, given_back_at=standing.healthy_steps)
            self._account.record(_HEALTHY, "", ("give back",), before)
        elif factor < 1:
            self.scale(factor, reduce.min_lr)
            self._lowered += 1
            standing.policy = self._policy.too_high(before[0], standing.healthy_steps, standing.policy)
            self._account.record(_STILL_HIGH, "", (reduce.word,), before)

    def _raise_rate(self, ratio: float, step: Scale, min_lr: float) -> None:
        self._lowered = 0
        multiplier, limit = self._rate.multiplier, self._rate.max_lr
        if step.limit:
            multiplier, limit = 1.0, self._rate.effective()[0] * step.factor
        else:
            multiplier, limit = min(1.0, multiplier * step.factor), limit * step.factor
        self._rate.set_multiplier(multiplier, min_lr=min_lr, max_lr=math.inf if ratio >= 1.0 else limit)

    def _end_clipping(self) -> None:
        clip, healthy = self._clip, self._standing.healthy_steps - self._clipping_since
        if self.clipper.value is not None and isinstance(clip, ClipGradients) and healthy >= clip.recover_after:
            self.clip(math.inf, "norm")
            self._account.record(_HEALTHY, "", ("end clipping",), self._rate.effective())

    def state_dict(self) -> dict[str, Any]:
        """Plain containers."""
        return {
            "clipping_since": self._clipping_since,
            "lowered": self._lowered,
            "clipper": self.clipper.state_dict(),
            "rate": self._rate.state_dict(),
            "reviews": self._reviews.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._clipping_since = int(state["clipping_since"])
        self._lowered = int(state.get("lowered", 0))
        self.clipper.load_state_dict(state["clipper"])
        self._rate.load_state_dict(state["rate"])
        self._reviews.load_state_dict(state["reviews"])
