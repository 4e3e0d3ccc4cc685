"""From a fault and its evidence to a plan: pure functions over frozen data.

The evidence chooses who is to blame, and that chooses the remedy:

* one bad *batch* is skipped;
* a diverged *learner* is taken back to a certified snapshot and slowed or clipped, further each time it comes back
  soon;
* *state* that went bad by itself is restored and nothing else;
* what never was good, or goes over its budget, is stopped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from lightning_nanguard.events import Fault, Plan, PlanStep, Restore, Scale, Scope, Skip, Stop


@dataclass(frozen=True, slots=True)
class Comparison:
    """The loss of one batch under the weights of now and under the last good ones, with the same random numbers."""

    now: float
    then: float

    def worse(self, scale: float) -> bool:
        """Whether today's weights are clearly worse on this batch; ``scale`` is the loss's own scale."""
        if not math.isfinite(self.then):
            return False
        if not math.isfinite(self.now):
            return True
        return self.now - self.then > 0.5 * max(scale, abs(self.then))


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known when a fault is looked into.

    Attributes:
        step: The guard's clock.
        healthy_steps: Updates accepted since the start of fit.
        healthy_since_restore: Updates accepted since the last restore; ``None`` without one.
        bad_in_a_row: Faulty updates in a row, this one included.
        corrupt: Name of the first tensor of the learner that is not finite and was at the start; ``None`` if all are.
        batch_finite: Whether every floating number in the batch is finite; ``None`` where it was not looked at.
        comparison: Loss of the batch under the weights of now and of the snapshot; ``None`` where it cannot be had.
        loss_scale_of_first: Scale of the untrained model's loss.
        growth: Largest ratio of a matrix's norm to its norm at the start.
        climbing: Whether losses or gradients were rising out of their usual range just before the fault.
        rate_rose: Whether the scheduled learning rate is clearly above that of the snapshot.
        snapshots: How many certified snapshots there are.
        levels: Loss level of every certified snapshot, newest first.
        usual_norm: Median of the healthy gradient norms, ``None`` when too few were seen.
        lr: Effective learning rate of the first group.
        multiplier: The learning-rate multiplier in force.
        undo: Whether the faulty update already reached the weights (deferred readback).
    """

    step: int
    healthy_steps: int = 0
    healthy_since_restore: int | None = None
    bad_in_a_row: int = 1
    corrupt: str | None = None
    batch_finite: bool | None = None
    comparison: Comparison | None = None
    loss_scale_of_first: float = 1.0
    growth: float = 1.0
    climbing: bool = False
    rate_rose: bool = False
    snapshots: int = 0
    levels: tuple[float | None, ...] = ()
    usual_norm: float | None = None
    lr: float | None = None
    multiplier: float = 1.0
    undo: bool = False


class Proposes(Protocol):
    """What the policy sees of a remedy."""

    @property
    def word(self) -> str:
        """Short name, as it stands in the records."""

    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        """What this remedy would do at the given attempt (0 at first, +1 each time the trouble comes back soon)."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Bounds that make every loop of interventions end.

    Args:
        max_rollbacks: Restores within ``window`` updates.
        max_rollbacks_per_place: Restores for the same fault at the same place within ``window`` updates.
        max_bad_batches: Faulty updates in a row.
        max_skip_share: Share of skipped updates among the last ``window``, once ``max_bad_batches`` were skipped.
        window: Length of the sliding window, in updates.

    Raises:
        ValueError: When a bound is out of its range.
    """

    max_rollbacks: int = 20
    max_rollbacks_per_place: int = 15
    max_bad_batches: int = 32
    max_skip_share: float = 0.5
    window: int = 1000

    def __post_init__(self) -> None:
        for name in ("max_rollbacks", "max_rollbacks_per_place", "max_bad_batches", "window"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"Budget({name}={value!r}): expected an integer of at least 1.")
        if not 0 < self.max_skip_share <= 1:
            raise ValueError(f"Budget(max_skip_share={self.max_skip_share!r}): expected a number above 0, at most 1.")


@dataclass(frozen=True, slots=True)
class PolicyState:
    """What the policy remembers: plain tuples and numbers.

    Attributes:
        attempt: Escalation for a diverged learner; 0 at first.
        learner_step: Step of the last plan for a diverged learner, ``-1`` without one.
        restores: ``(step, fault and place)`` of the restores within the budget's window.
        skips: Steps of the skips within the budget's window.
        bad_rate: Lowest effective learning rate at which the learner diverged, ``inf`` when it never did.
        failed_returns: How often the learner diverged again after a cut was given back.
        given_back_at: Healthy-step count at the last change of the multiplier.
    """

    attempt: int = 0
    learner_step: int = -1
    restores: tuple[tuple[int, str], ...] = ()
    skips: tuple[int, ...] = ()
    bad_rate: float = math.inf
    failed_returns: int = 0
    given_back_at: int = 0


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules, configured by the remedies a user allows and by budgets.

    Args:
        remedies: What may follow when skipping is not enough, in order of preference.
        budget: Bounds on interventions.
        patience: Bad batches in a row before the learner is suspected.
        calm: Healthy updates after which a new divergence is a new story and the escalation starts over.
    """

    remedies: Sequence[Proposes]
    budget: Budget = Budget()
    patience: int = 4
    calm: int = 200

    def decide(self, fault: Fault, evidence: Evidence, state: PolicyState) -> tuple[Plan, PolicyState]:
        """The plan for a fault; an empty plan says that it was none."""
        state = _within(state, evidence.step - self.budget.window)
        if evidence.healthy_steps == 0 and evidence.bad_in_a_row >= self._start_patience(evidence):
            return (
                Stop(f"no update was ever good: the first {evidence.bad_in_a_row} were all bad"),
            ), state
        scope = self._blame(fault, evidence)
        if scope is None:
            return (), state
        if scope == "batch":
            return self._skip(fault, evidence, state)
        return self._rewind(fault, evidence, state, scope)

    def _start_patience(self, evidence: Evidence) -> int:
        # Batches that are themselves corrupt say nothing about the model: wait longer for a clean one.
        return self.budget.max_bad_batches if evidence.batch_finite is False else 2 * self.patience

    def _blame(self, fault: Fault, evidence: Evidence) -> Scope | None:
        if fault.scope == "state":
            return "state"
        if evidence.corrupt is not None:
            return "learner" if evidence.climbing or evidence.rate_rose else "state"
        if fault.scope == "learner":
            return self._confirm(fault, evidence)
        if evidence.batch_finite is False:
            return "batch"
        comparison = evidence.comparison
        if comparison is not None and comparison.worse(evidence.loss_scale_of_first):
            return "learner" if self._learner_did_it(evidence) else "state"
        if evidence.bad_in_a_row >= self.patience and evidence.bad_in_a_row % self.patience == 0:
            # A stretch of bad batches under good weights is the data's fault, however long.
            data = comparison is not None and not math.isfinite(comparison.then)
            return "batch" if data else "learner"
        return "batch"

    def _confirm(self, fault: Fault, evidence: Evidence) -> Scope | None:
        comparison = evidence.comparison
        if comparison is None or fault.kind == "loss_scale_collapse":
            return "learner"
        if fault.kind == "stuck_loss":
            # Both losses are at chance here: only the weights tell a ruined learner from a hard task.
            return "learner" if evidence.growth > 3 or comparison.worse(evidence.loss_scale_of_first) else None
        return "learner" if comparison.worse(0.1 * evidence.loss_scale_of_first) else None

    def _learner_did_it(self, evidence: Evidence) -> bool:
        soon = evidence.healthy_since_restore is not None and evidence.healthy_since_restore < self.calm
        return evidence.climbing or evidence.rate_rose or soon or evidence.healthy_steps < 20

    def _skip(self, fault: Fault, evidence: Evidence, state: PolicyState) -> tuple[Plan, PolicyState]:
        if evidence.bad_in_a_row > self.budget.max_bad_batches:
            return (Stop(f"{evidence.bad_in_a_row} updates in a row were bad"),), state
        state = replace(state, skips=(*state.skips, evidence.step))
        seen = min(self.budget.window, evidence.step + 1)
        if len(state.skips) > max(self.budget.max_bad_batches, self.budget.max_skip_share * seen):
            return (Stop(f"{len(state.skips)} of the last {seen} updates were bad"),), state
        if evidence.undo:
            return self._count_restore(fault, evidence, state, (Restore(0),))
        return (Skip(),), state

    def _rewind(
        self, fault: Fault, evidence: Evidence, state: PolicyState, scope: Scope
    ) -> tuple[Plan, PolicyState]:
        attempt, state = self._escalate(evidence, state) if scope == "learner" else (0, state)
        steps: list[PlanStep] = []
        corrected = False
        for remedy in self.remedies:
            proposal = remedy.propose(fault, evidence, attempt)
            if proposal is None:
                continue
            if isinstance(proposal, Stop):
                # Whoever prefers stopping gets it where nothing listed before could help.
                if not steps:
                    steps.append(proposal)
                break
            if isinstance(proposal, Restore):
                recent = sum(1 for step, _ in state.restores if step > evidence.step - self.calm)
                depth = proposal.depth if scope == "learner" else proposal.depth + min(recent // 2, 8)
                steps.append(Restore(_by_level(depth, evidence)))
            elif scope == "learner" and (not corrected or attempt > 0):
                steps.append(proposal)
                corrected = True
        if any(isinstance(step, Stop) for step in steps):
            return tuple(steps), state
        restoring = any(isinstance(step, Restore) for step in steps)
        lost = evidence.corrupt is not None or (evidence.comparison is not None and not math.isfinite(evidence.comparison.now))
        if not restoring and (lost or not steps):
            if fault.scope == "batch" and not lost:
                return self._skip(fault, evidence, state)
            return (Stop("the learner is lost and no remedy that could bring it back is allowed"),), state
        if restoring and evidence.snapshots == 0:
            return (Stop("the learner is lost before there was a good state to go back to"),), state
        if scope == "learner":
            rate = evidence.lr if evidence.lr is not None else math.inf
            state = replace(state, bad_rate=min(state.bad_rate, rate), given_back_at=evidence.healthy_steps)
        return self._count_restore(fault, evidence, state, tuple(steps))

    def _escalate(self, evidence: Evidence, state: PolicyState) -> tuple[int, PolicyState]:
        since = evidence.healthy_since_restore
        again = state.learner_step >= 0 and since is not None and since < self.calm
        returned = state.learner_step >= 0 and evidence.multiplier < 1.0 and not again
        attempt = state.attempt + 1 if again else 0
        return attempt, replace(
            state,
            attempt=attempt,
            learner_step=evidence.step,
            failed_returns=state.failed_returns + int(returned),
        )

    def _count_restore(
        self, fault: Fault, evidence: Evidence, state: PolicyState, plan: Plan
    ) -> tuple[Plan, PolicyState]:
        where = f"{fault.kind} at {fault.place}"
        state = replace(state, restores=(*state.restores, (evidence.step, where)))
        here = sum(1 for _, place in state.restores if place == where)
        if len(state.restores) > self.budget.max_rollbacks or here > self.budget.max_rollbacks_per_place:
            count = f"{len(state.restores) - 1} rollbacks within {self.budget.window} updates, {here - 1} of them for this"
            return (Stop(f"the budget is used up: {count}"),), state
        return plan, state

    def give_back(
        self, evidence: Evidence, scheduled_lr: float | None, factor: float, after: int, state: PolicyState
    ) -> tuple[Plan, PolicyState]:
        """Give back a step of the learning rate's cut after a healthy stretch.

        Towards rates that never failed it goes quickly (a quarter of ``after``); across the lowest rate that did,
        only after ``after`` healthy updates, twice as many for every time it failed again.
        """
        if evidence.multiplier >= 1.0 or scheduled_lr is None:
            return (), state
        larger = min(1.0, evidence.multiplier / factor)
        safe = scheduled_lr * larger < 0.75 * state.bad_rate
        wait = max(1, after // 4) if safe else after * 2 ** min(state.failed_returns + 2, 10)
        if evidence.healthy_steps - state.given_back_at < wait:
            return (), state
        bad_rate = state.bad_rate if safe else math.inf
        return (Scale(larger / evidence.multiplier),), replace(
            state, given_back_at=evidence.healthy_steps, bad_rate=bad_rate
        )


def _by_level(depth: int, evidence: Evidence) -> int:
    """At least ``depth``, and deeper while an older snapshot was at a clearly better loss."""
    last = max(0, evidence.snapshots - 1)
    depth = min(depth, last)
    levels = evidence.levels
    known = [level for level in levels if level is not None]
    if not known:
        return depth
    limit = min(known) + 0.25 * evidence.loss_scale_of_first
    for index in range(depth, len(levels)):
        level = levels[index]
        if level is None or level <= limit:
            return index
    return depth


def _within(state: PolicyState, oldest: int) -> PolicyState:
    restores = tuple(item for item in state.restores if item[0] > oldest)
    skips = tuple(step for step in state.skips if step > oldest)
    if len(restores) == len(state.restores) and len(skips) == len(state.skips):
        return state
    return replace(state, restores=restores, skips=skips)
