"""The counts and other state that a guard keeps from one intervention to the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from lightning_nanguard.decide.state import PolicyState
from lightning_nanguard.guard.readback import MAX_DELAY
from lightning_nanguard.state.learner import scheduled_values
from lightning_nanguard.types import Reading

# Plain values that last from one fit to the next.
_LASTING = (
    "step",
    "healthy_steps",
    "healthy_since_restore",
    "bad_in_a_row",
    "bad_losses_usual",
    "large_gradients_usual",
    "too_large",
)


@final
@dataclass(slots=True)
class GuardState:
    """Counts and other state that the parts of a guard share.

    A checkpoint holds what :meth:`state_dict` names. What belongs to the present batch is reset by :meth:`end_batch`.

    Attributes:
        step: Attempted updates so far.
        evaluating: Index of the optimizer whose evaluation was the last in this batch, if it evaluates its closure
            several times in one step, as LBFGS does; otherwise ``None``.
        healthy_steps: Healthy updates among them.
        healthy_since_restore: Healthy updates since the last restore; ``None`` before the first one.
        bad_in_a_row: Bad batches since the last healthy one.
        policy: The memory of the policy.
        redone: Whether the updates since the last restore were made again.
        redo_cause: What made the state bad when updates were made again because of the present batch, as in
            :attr:`Evidence.redo_cause`. The loop sets it.
        told: Update and words of the last fault that was left alone: a suspicion that the user was told of, or the
            first fault that was only observed; ``None`` before.
        raised: An exception of ``training_step``, in words. The next non-finite loss stands for it.
        bad_alone: The newest update whose loss alone was not finite, and the number of such updates in a row.
        bad_losses_usual: Whether such losses are usual in this run. They are then ignored.
        too_large: Number of updates since the start whose only fault was that the gradient was too large.
        large_gradients_usual: Whether such gradients are usual in this run. Gradient norms are then ignored.
        good_beside: ``step`` of the newest bad update in whose batch another optimizer's update was accepted; ``None``
            without one.
        skipped: Numbers of the newest updates that were skipped.
        passed_over: Whether the present update is left out because every sample of it is known to be bad.
        asks_hyperparameters: Whether all ranks compare their hyperparameters before the next update, because at least
            one of them had an invalid value.
        rates: Step and effective learning rate of the first group, for each step at which it changed.
        groups: Of the newest updates, the step and the values of each parameter group that a scheduler may set.
    """

    step: int = 0
    evaluating: int | None = None
    healthy_steps: int = 0
    healthy_since_restore: int | None = None
    bad_in_a_row: int = 0
    policy: PolicyState = field(default_factory=PolicyState)
    redone: bool = False
    redo_cause: tuple[str, str] = ("", "")
    told: tuple[int, str] | None = None
    raised: str | None = None
    bad_alone: tuple[int, int] = (-1, 0)
    bad_losses_usual: bool = False
    too_large: int = 0
    large_gradients_usual: bool = False
    good_beside: int | None = None
    skipped: deque[int] = field(default_factory=lambda: deque(maxlen=1024))
    passed_over: bool = False
    asks_hyperparameters: bool = False
    rates: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=1024))
    groups: deque[tuple[int, list[dict[str, Any]]]] = field(default_factory=lambda: deque(maxlen=MAX_DELAY + 1))

    def state_dict(self) -> dict[str, Any]:
        """The state that lasts from one step to the next, in plain containers."""
        lasting = {name: getattr(self, name) for name in _LASTING}
        return lasting | {"policy": self.policy.to_dict(), "rates": [list(one) for one in self.rates]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`. Entries that another version did not save keep their values."""
        for name in _LASTING:
            setattr(self, name, state.get(name, getattr(self, name)))
        self.policy = PolicyState.from_dict(state["policy"])
        self.rates.clear()
        self.rates.extend((int(step), float(rate)) for step, rate in state.get("rates", ()))

    def end_batch(self) -> None:
        """Reset what belongs to the batch that ends."""
        self.evaluating = self.raised = None
        self.redo_cause, self.passed_over = ("", ""), False

    @property
    def next_step(self) -> int:
        """Number of the update that is about to be made."""
        return self.step + (self.evaluating is None)

    def count(self, optimizer_index: int, *, several: bool) -> bool:
        """Count an update that is about to be made, once for all evaluations of a step; return whether it is a new one.

        Args:
            optimizer_index: Index of the optimizer.
            several: Whether it evaluates its closure several times in one step.
        """
        new = self.evaluating != optimizer_index
        self.step += new
        self.evaluating = optimizer_index if several else None
        return new

    def rolled_back_since(self, step: int) -> bool:
        """Whether the run was rolled back after update ``step``."""
        return any(at > step for at, _ in self.policy.restores)

    @property
    def last_rollback(self) -> int:
        """The update after which the run was rolled back last; 0 if it never was."""
        return max((step for step, _ in self.policy.restores), default=0)

    def highest_rate(self, since: int) -> float:
        """The highest effective learning rate since update ``since``; 0 if no rate is known."""
        before = [rate for step, rate in self.rates if step <= since]
        return max([*before[-1:], *(rate for step, rate in self.rates if step > since)], default=0.0)

    def note_bad_loss(self, step: int, patience: int) -> bool:
        """Note an update whose loss alone was not finite; return whether so many in a row make this usual."""
        last, times = self.bad_alone
        if step != last:  # otherwise it is a further evaluation of the same update
            self.bad_alone = step, times + 1 if step == last + 1 else 1
        self.bad_losses_usual = self.bad_alone[1] >= patience
        return self.bad_losses_usual

    def note_large_gradient(self, patience: int) -> bool:
        """Note an update whose gradients were only too large; return whether all were so far, and were many."""
        self.too_large += 1
        self.large_gradients_usual = self.healthy_steps == 0 and self.too_large == self.step >= patience
        return self.large_gradients_usual

    def unusual(self, reading: Reading) -> Reading:
        """A reading without the numbers that are usual in this run, and would be a fault in others."""
        if self.bad_losses_usual and reading.loss_is_bad_alone:
            reading = reading._replace(loss=None, loss_finite=True, finite=True)
        if self.large_gradients_usual and reading.finite:
            reading = reading._replace(grad_norm=None)
        return reading

    def note_groups(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Store what a scheduler may have set for this step in the parameter groups of the optimizer."""
        self.groups.append((self.step, scheduled_values(groups)))

    def note_rate(self, rate: float | None) -> None:
        """Store the effective learning rate of this step, if it changed."""
        if rate is not None and (not self.rates or self.rates[-1][1] != rate):
            self.rates.append((self.step, rate))

    @property
    def first_rate(self) -> float | None:
        """Effective learning rate of the first update that is known; ``None`` if none is."""
        return self.rates[0][1] if self.rates else None
