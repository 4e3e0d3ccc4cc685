"""Cuts the rate, reviews the cut, turns clipping on, and ends both after many healthy updates in a row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, final

from lightning_nanguard.act.base import Remedy
from lightning_nanguard.act.clip_gradients import ClipGradients
from lightning_nanguard.act.reduce_lr import ReduceLR
from lightning_nanguard.decide.recovery import give_back, note_too_high
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.recorder import InterventionRecorder
from lightning_nanguard.guard.rehearsal import Rehearsal, Reviews
from lightning_nanguard.types import Fault, Scale

_HEALTHY = Fault("healthy_stretch", "learner", "", None, "there was no fault in many updates in a row")


_STILL_HIGH = Fault(
    "rate_still_high", "learner", "", None, "at this rate, learning a few batches makes the loss of others worse"
)


@final
class Recovery:
    """Cuts the rate, reviews the cut, turns clipping on, and ends both after many healthy updates in a row.

    Args:
        context: Objects and settings that the parts of the guard share.
        rehearsal: Tries rates.
        recorder: Records what was done.
        reduce: How the user wants the rate to be cut and raised again.
        clip: How the user wants gradients to be clipped.
        may_lower: Whether the user allows a cut of the rate.
    """

    def __init__(
        self,
        context: GuardContext,
        rehearsal: Rehearsal,
        recorder: InterventionRecorder,
        reduce: Remedy,
        clip: Remedy,
        *,
        may_lower: bool,
    ) -> None:
        self._context = context
        self._rate = context.rate
        self._state = context.state
        self._rehearsal = rehearsal
        self._recorder = recorder
        self._reduce = reduce
        self._clip = clip
        self._may_lower = may_lower
        self._limits = context.thresholds.rate_search.review
        self._lowered = 0
        self._tried = False  # whether a trial has found the present rate
        self._reviews = Reviews(self._limits)
        self._clipping_since = 0
        # Of a checkpoint: the cut rate and the clipping, which a guard that only observes hands on and does not apply.
        self._not_applied: dict[str, Any] = {}

    def scale(self, factor: float, min_lr: float, *, limit: bool = False, tried: bool = False) -> None:
        """Multiply the learning rate. With ``limit``, set the product as the highest rate allowed instead.

        With ``tried``, a trial has found the factor. No review lowers such a rate, but one may raise it.
        """
        rate = self._rate
        self._tried = tried
        effective = rate.effective()
        if not effective:
            return  # no optimizer has a rate
        if (limit or rate.ratio() < rate.multiplier) and effective[0] > 0:
            rate.set_multiplier(rate.multiplier, min_lr=min_lr, max_lr=effective[0] * factor)
        else:
            rate.set_multiplier(min(1.0, rate.multiplier * factor), min_lr=min_lr, max_lr=rate.max_lr)
        self._reviews.begin(self._state.healthy_steps)

    def clip(self, value: float, algorithm: Literal["norm", "value"]) -> None:
        """Clip gradients from now on; ``inf`` ends clipping."""
        self._context.clipper.set(value, algorithm)
        self._clipping_since = self._state.healthy_steps
        # A review may find that clipping alone was not enough.
        self._reviews.begin(self._state.healthy_steps)

    def give_back(self, *, trial_runs: bool) -> None:
        """After a healthy update: raise the rate, review it, or end clipping, if that is due.

        Args:
            trial_runs: Whether a trial is running beside the run.
        """
        if not self._rate.is_on() and self._context.clipper.value is None:
            return
        state, reduce = self._state, self._reduce
        # If a trial has found the rate, only another trial decides whether it is still too high.
        kept = trial_runs and self._tried
        if kept or (self._rate.has_tensors() and state.healthy_steps % self._limits.tensor_rate_every):
            self._end_clipping()
            return
        before = self._rate.effective() if self._rate.is_on() else []
        ratio = self._rate.ratio() if before else 1.0
        if ratio < 1.0 and isinstance(reduce, ReduceLR):
            step, state.policy = give_back(
                state.policy,
                multiplier=ratio,
                healthy_steps=state.healthy_steps,
                scheduled_lr=self._rate.scheduled()[0],
                factor=reduce.factor,
                after=reduce.recover_after,
                learning=self._context.monitors.learning(),
                limits=self._context.thresholds.decision.recovery,
            )
            if step is not None and reduce.rehearse and self._rehearsal.harmful(step.factor):
                state.policy = replace(state.policy, proven_rate=0.0)
            elif step is not None:
                self._raise_rate(ratio * step.factor, step, reduce.min_lr)
                self._recorder.record(_HEALTHY, ("give back",), before)
                self._reviews.begin(state.healthy_steps)
        if isinstance(reduce, ReduceLR):
            self._review(reduce)
        self._end_clipping()

    def _review(self, reduce: ReduceLR) -> None:
        # The rate was cut on very little evidence. Now there is more.
        state, limits = self._state, self._limits
        if not (reduce.rehearse and self._reviews.due(state.healthy_steps)):
            return
        history = self._context.monitors.history(0)
        before, ratio = self._rate.effective(), self._rate.ratio()
        if not before:
            return
        larger = before[0] / self._context.thresholds.rate_search.cut.ratio
        may_rise = ratio * limits.raised <= 1 and larger < state.policy.bad_rate
        # If the loss falls, this rate is good enough. If it has never fallen, it says nothing about the rate.
        rests = history.learning() and not history.falling() and not self._tried
        rests &= self._may_lower and self._lowered < limits.most_lowered and before[0] > reduce.min_lr
        if not (may_rise or rests):
            return
        factor = self._rehearsal.review(history.first if rests else None, at_most=limits.raised if may_rise else 1.0)
        if factor > 1:
            self._raise_rate(ratio * factor, Scale(factor), reduce.min_lr)
            self._reviews.begin(state.healthy_steps)
            state.policy = replace(state.policy, given_back_at=state.healthy_steps)
            self._recorder.record(_HEALTHY, ("give back",), before)
        elif factor < 1:
            self.scale(factor, reduce.min_lr)
            self._lowered += 1
            state.policy = note_too_high(before[0], state.healthy_steps, state.policy)
            self._recorder.record(_STILL_HIGH, (reduce.word,), before)

    def _raise_rate(self, ratio: float, step: Scale, min_lr: float) -> None:
        self._lowered, self._tried = 0, False
        multiplier, limit = self._rate.multiplier, self._rate.max_lr
        if step.limit:
            multiplier, limit = 1.0, self._rate.effective()[0] * step.factor
        else:
            multiplier, limit = min(1.0, multiplier * step.factor), limit * step.factor
        self._rate.set_multiplier(multiplier, min_lr=min_lr, max_lr=math.inf if ratio >= 1.0 else limit)

    def _end_clipping(self) -> None:
        clip, healthy = self._clip, self._state.healthy_steps - self._clipping_since
        if (
            self._context.clipper.value is not None
            and isinstance(clip, ClipGradients)
            and healthy >= clip.recover_after
        ):
            self.clip(math.inf, "norm")
            self._recorder.record(_HEALTHY, ("end clipping",), self._rate.effective())

    def state_dict(self) -> dict[str, Any]:
        """The state in plain containers."""
        return {
            "clipping_since": self._clipping_since,
            "lowered": self._lowered,
            "tried": self._tried,
            "clipper": self._context.clipper.state_dict(),
            "rate": self._rate.state_dict(),
            "reviews": self._reviews.state_dict(),
            **self._not_applied,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._clipping_since = int(state["clipping_since"])
        self._lowered = int(state.get("lowered", 0))
        self._tried = state.get("tried", False) is True
        if self._context.settings.observe:
            self._not_applied = {name: dict(state[name]) for name in ("clipper", "rate")}
        else:
            self._context.clipper.load_state_dict(state["clipper"])
            self._rate.load_state_dict(state["rate"])
        self._reviews.load_state_dict(state["reviews"])
