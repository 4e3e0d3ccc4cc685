"""What a guard counts and remembers from one intervention to the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from lightning_nanguard.decide.state import PolicyState
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.types import Reading


@final
@dataclass(slots=True)
class GuardState:
    """Counts that the parts of a guard share.

    Attributes:
        step: Attempted updates so far.
        healthy_steps: Healthy ones among them.
        healthy_since_restore: Those since the last restore; ``None`` before the first.
        bad_in_a_row: Bad batches since the last healthy one.
        policy: What the policy remembers.
        restored: The snapshot that the present intervention restored; ``None`` where it restored none.
        go_on: Makes the updates since a snapshot again after a rollback, and gives whether it could; it is given the
            reading of the update that was bad, where one was made. ``None`` where the loop cannot.
        went_on: Whether the updates since it were made again in the present intervention.
        again: What spoilt the state when updates were made again, as in :attr:`Evidence.again`.
        told: Update and words of the last fault that was left alone: a finite suspicion that the user was told of, or
            the first fault that was only observed; ``None`` before.
        raised: The exception of ``training_step`` that the next non-finite loss stands for, in words.
        infinite: Step of the newest update whose loss alone was infinite, and how many were so in a row.
        losses_overflow: Whether such losses are usual in this run: its loss overflows, and its gradients do not.
        arm: What a trial has trained from the start, where it is to be gone on from there; ``None`` without one.
        unrestored: What is still not finite after the present intervention has restored a snapshot, in words.
        skipped: Numbers of the newest updates that were skipped.
        passed_over: Whether the update at hand is left out because every sample of it is known to be bad.
        rates: Step and effective learning rate of the first group, for each step at which it changed.
    """

    step: int = 0
    healthy_steps: int = 0
    healthy_since_restore: int | None = None
    bad_in_a_row: int = 0
    policy: PolicyState = field(default_factory=PolicyState)
    restored: Snapshot | None = None
    go_on: Callable[[Snapshot, Reading | None], bool] | None = None
    went_on: bool = False
    again: tuple[str, str] = ("", "")
    told: tuple[int, str] | None = None
    raised: str | None = None
    infinite: tuple[int, int] = (-1, 0)
    losses_overflow: bool = False
    arm: Snapshot | None = None
    unrestored: str | None = None
    skipped: deque[int] = field(default_factory=lambda: deque(maxlen=1024))
    passed_over: bool = False
    rates: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=1024))

    def state_dict(self) -> dict[str, Any]:
        """What lasts from one step to the next, in plain containers."""
        return {
            "step": self.step,
            "healthy_steps": self.healthy_steps,
            "healthy_since_restore": self.healthy_since_restore,
            "bad_in_a_row": self.bad_in_a_row,
            "policy": self.policy.to_dict(),
            "rates": [list(one) for one in self.rates],
            "losses_overflow": self.losses_overflow,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; checkpoints of version 0.1.0 lack the rates."""
        self.step = int(state["step"])
        self.healthy_steps = int(state["healthy_steps"])
        self.healthy_since_restore = state["healthy_since_restore"]
        self.bad_in_a_row = int(state["bad_in_a_row"])
        self.policy = PolicyState.from_dict(state["policy"])
        self.losses_overflow = bool(state.get("losses_overflow", False))
        self.rates.clear()
        self.rates.extend((int(step), float(rate)) for step, rate in state.get("rates", ()))

    def rolled_back_since(self, step: int) -> bool:
        """Whether the run was rolled back after an update."""
        return any(at > step for at, _ in self.policy.restores)

    def note_overflow(self, step: int, patience: int) -> bool:
        """Note an update whose loss alone was infinite; whether so many in a row were that it is usual from now on."""
        last, times = self.infinite
        self.infinite = step, times + 1 if step == last + 1 else 1
        usual = self.infinite[1] >= patience
        self.losses_overflow |= usual
        return usual

    def note_rate(self, rate: float | None) -> None:
        """Remember the effective learning rate of this step, where it changed."""
        if rate is not None and (not self.rates or self.rates[-1][1] != rate):
            self.rates.append((self.step, rate))
