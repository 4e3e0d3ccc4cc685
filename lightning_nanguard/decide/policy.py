"""Makes a plan from a fault and its evidence: pure functions of frozen data.

The evidence decides what is at fault. The scope then decides the remedy:

* A single bad *batch* is skipped.
* A diverged *learner* goes back to a certified snapshot, with a lower learning rate or clipped gradients. The
  correction is stronger each time it diverges again soon.
* *State* that became bad by itself is restored, without a correction.
* If only averages are bad, of weights or of the statistics of batches, only they are restored, because no update is
  made from them.
* If only the scale of the GradScaler is bad, only it is restored, because the GradScaler has skipped all updates since.
* A run without one good update, or over its budget, is stopped.

The policy calls every listed remedy whose role the verdict needs. If the learner is to blame, these are a restore and
all listed corrections (clipping and the rate), because a loss may explode by its rate or by rare large gradients. If
clipping alone is enough, the planned cut is not made. Remedies with the role ``notify`` are called at every fault.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, final

from lightning_nanguard.decide.blame import find_scope, rate_rises
from lightning_nanguard.decide.budget import Budget
from lightning_nanguard.decide.recovery import note_failed
from lightning_nanguard.decide.state import PolicyState, within_window
from lightning_nanguard.decide.trial import is_enough
from lightning_nanguard.thresholds.decision import DecisionThresholds
from lightning_nanguard.thresholds.trial import TrialThresholds
from lightning_nanguard.types import (
    Clip,
    Evidence,
    Fault,
    Plan,
    PlanStep,
    Restore,
    RestoreAverages,
    RestoreScale,
    Role,
    Scale,
    Scope,
    Skip,
    Stop,
)

_IN_A_ROW = "max_bad_batches"
"""The limit of :class:`~lightning_nanguard.Budget` on bad updates in a row."""


class Proposes(Protocol):
    """The part of a remedy that the policy uses."""

    @property
    def role(self) -> Role:
        """The role of the remedy."""

    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        """The remedy's plan step at this attempt (0 at first, +1 each time the fault comes back soon)."""


@final
@dataclass(frozen=True, slots=True)
class Policy:
    """Plans what to do about a fault, with the remedies and the budget of the user.

    Args:
        remedies: The remedies used if skipping is not enough, in order of preference.
        budget: Limits on interventions.
        thresholds: When the batch, the learner or the state is blamed.
        trials: What a trial has to show before the guard acts.
    """

    remedies: Sequence[Proposes]
    budget: Budget = field(default_factory=Budget)
    thresholds: DecisionThresholds = field(default_factory=DecisionThresholds)
    trials: TrialThresholds = field(default_factory=TrialThresholds)

    def decide(self, fault: Fault, evidence: Evidence, state: PolicyState) -> tuple[Plan, PolicyState]:
        """The plan for a fault; an empty plan means that it was a false alarm."""
        plan, state = self._decide(fault, evidence, within_window(state, evidence.step - self.budget.window))
        if not plan:
            return (), state
        told = (one.propose(fault, evidence, state.attempt) for one in self.remedies if one.role == "notify")
        return (*plan, *(step for step in told if step is not None)), state

    def _restore_averages(self, fault: Fault, evidence: Evidence, state: PolicyState) -> tuple[Plan, PolicyState]:
        """The plan if only averages are bad. It loses no update, and does not count against the budget."""
        plan: Plan = ()
        if fault.scope != "state":
            plan, state = self._decide(fault, replace(evidence, alone=None, corrupt=None), state)
        goes_back = any(isinstance(step, (Restore, Stop)) for step in plan)
        return (plan if goes_back or not self._may_restore() else (RestoreAverages(), *plan)), state

    def _may_restore(self) -> bool:
        return any(one.role == "restore" for one in self.remedies)

    def _decide(self, fault: Fault, evidence: Evidence, state: PolicyState) -> tuple[Plan, PolicyState]:
        if evidence.alone == "averages":
            return self._restore_averages(fault, evidence, state)
        if evidence.alone == "scale" and self._may_restore():
            plan: Plan = (RestoreScale(),)
            if state.restores[-1:] == ((evidence.step, _where(fault, evidence)),):
                return plan, state  # counted for another optimizer of the same batch
            return self._count_restore(fault, evidence, state, plan)
        start = evidence.healthy_steps == 0 and evidence.bad_in_a_row >= self._most_in_a_row(start=True)
        if start and not self._other_learns(evidence):
            limit = "" if self._most_in_a_row(start=True) == self.thresholds.blame.patience_with_chance else _IN_A_ROW
            reason = f"no update was ever good: the first {evidence.bad_in_a_row} were all bad"
            return _end(fault, evidence, reason, limit), state
        scope = find_scope(fault, evidence, self.thresholds.blame)
        trial = evidence.trial
        if trial is not None:
            shown = state.trials_confirmed + 1 if trial.lacks > 0 else 0
            state = replace(state, trials_confirmed=shown)
            if shown and not is_enough(trial, shown, self.trials):
                return (), state
        if scope is None:
            return (), state
        if evidence.redo_cause[0]:
            where, scope = _where(fault, evidence), "state"
            times = state.restores_of(where)
            if times >= self.thresholds.corrected_restores:
                return (Stop(f"after {times} rollbacks an update from finite numbers still makes {where}"),), state
        elif scope == "state" and state.unproven.count(_where(fault)) >= self.thresholds.same_restores:
            scope = "learner"  # repeated restores without success
        if scope == "batch":
            return self._skip(fault, evidence, state)
        return self._go_back(fault, evidence, state, scope)

    def may_repeat_updates(self, fault: Fault, step: int, state: PolicyState) -> bool:
        """Whether the budget allows a rollback after which the updates since the snapshot are repeated."""
        state, budget, where = within_window(state, step - self.budget.window), self.budget, _where(fault)
        here = state.restores_of(where)
        within = len(state.restores) < budget.max_rollbacks and here < budget.max_rollbacks_per_place
        useful = state.unproven.count(where) < self.thresholds.same_restores
        return within and useful and self._may_restore()

    def count_repeated_updates(self, fault: Fault, step: int, state: PolicyState) -> PolicyState:
        """Count a rollback with repeated updates like any other."""
        return within_window(state, step - self.budget.window).restored(step, _where(fault))

    def _other_learns(self, evidence: Evidence) -> bool:
        """Whether updates of one optimizer are bad while those of another are good, so that skipping is enough."""
        return evidence.good_beside is not None and evidence.step - evidence.good_beside < self.budget.window

    def _most_in_a_row(self, *, start: bool = False) -> int:
        budget = self.budget
        most = budget.window if budget.max_bad_batches is None else budget.max_bad_batches
        return min(most, self.thresholds.blame.patience_with_chance) if start else most

    def _skip(self, fault: Fault, evidence: Evidence, state: PolicyState) -> tuple[Plan, PolicyState]:
        if evidence.bad_in_a_row > self._most_in_a_row() and not self._other_learns(evidence):
            return _end(fault, evidence, f"{evidence.bad_in_a_row} updates in a row were bad", _IN_A_ROW), state
        skips = (*state.skips, evidence.step)
        seen, share = min(self.budget.window, evidence.step + 1), self.budget.max_skip_share
        if share is not None and len(skips) > max(self.thresholds.few_skips, share * seen):
            return _end(fault, evidence, f"{len(skips)} of the last {seen} updates were bad", "max_skip_share"), state
        # With deferred readback the update was already made, so a rollback undoes it.
        return ((Restore(0),) if evidence.undo else (Skip(),)), replace(state, skips=skips)

    def _go_back(self, fault: Fault, evidence: Evidence, state: PolicyState, scope: Scope) -> tuple[Plan, PolicyState]:
        before = state
        attempt, state = self._escalate(evidence, state) if scope == "learner" else (0, state)
        steps = self._proposals(fault, evidence, state, scope, attempt)
        if any(isinstance(step, Stop) for step in steps):
            return tuple(steps), state
        restoring = any(isinstance(step, Restore) for step in steps)
        if evidence.undo and not restoring:
            steps, restoring = [Restore(0), *steps], True  # only a restore can undo an update that was made
        comparison = evidence.comparison
        worse = comparison is not None and not math.isfinite(comparison.now)
        # Without a remedy in the list, the user wants batches to be skipped as long as the weights are finite.
        lost = evidence.corrupt is not None or (worse and bool(self.remedies))
        if not restoring and (lost or not steps):
            if fault.scope == "batch" and not lost:
                return self._skip(fault, evidence, state)
            return _end(fault, evidence, "the learner is at fault, and no remedy in the list can help"), before
        if restoring and not evidence.levels:
            reason = "the learner is at fault, and there is no good state yet to go back to"
            return _end(fault, evidence, reason), before
        if scope == "learner":
            rates = [rate for rate in (evidence.lr, evidence.highest_lr) if rate is not None]
            highest = max(rates, default=math.inf)
            state = note_failed(highest, evidence.healthy_steps, state, self.thresholds.recovery)
        plan, state = self._count_restore(fault, evidence, state, tuple(steps))
        return plan, state if plan else before

    def _proposals(
        self, fault: Fault, evidence: Evidence, state: PolicyState, scope: Scope, attempt: int
    ) -> list[PlanStep]:
        steps: list[PlanStep] = []
        for remedy in self.remedies:
            role = remedy.role
            if role in ("skip", "notify") or (role in ("rate", "clip", "moments") and scope != "learner"):
                continue
            proposal = remedy.propose(fault, evidence, attempt)
            if proposal is None:
                continue
            if role == "stop":
                # Stop if no remedy listed before it proposed anything.
                if not steps:
                    return [proposal]
            elif role == "restore":
                steps.append(self._deep_enough(proposal, evidence, state, scope))
            else:
                fitting = self._fitted(proposal, evidence, state, steps, attempt)
                steps += [] if fitting is None else [fitting]
        return steps

    def _deep_enough(self, proposal: PlanStep, evidence: Evidence, state: PolicyState, scope: Scope) -> PlanStep:
        if not isinstance(proposal, Restore):
            return proposal
        limits = self.thresholds
        recent = sum(1 for step, _ in state.restores if step > evidence.step - limits.blame.calm)
        deeper = 0 if scope == "learner" else recent // limits.depth_by_state
        # Certified snapshots are finite, so against a tensor that is not finite any depth is enough.
        trial = evidence.trial if evidence.corrupt is None else None
        from_start = trial is not None and trial.base == "start"
        depth = len(evidence.levels) if from_start else proposal.depth + deeper
        return Restore(depth_by_level(depth, evidence, same_level=self.trials.lacks, keeps=trial is None))

    def _fitted(
        self, proposal: PlanStep, evidence: Evidence, state: PolicyState, steps: Sequence[PlanStep], attempt: int
    ) -> PlanStep | None:
        if not isinstance(proposal, Scale):
            return proposal
        if attempt == 0 and not proposal.tried and self._peak_is_over(evidence, state):
            return None
        clipped = attempt == 0 and any(isinstance(step, Clip) for step in steps)
        return replace(proposal, limit=rate_rises(evidence, self.thresholds.blame), clipped=clipped)

    def _peak_is_over(self, evidence: Evidence, state: PolicyState) -> bool:
        # The run diverged at a peak of the schedule, and it learned before at the present rate.
        lr, highest = evidence.lr, evidence.highest_lr
        if lr is None or highest is None:
            return False
        return lr <= state.proven_rate and highest > self.thresholds.blame.rate_risen * lr

    def _escalate(self, evidence: Evidence, state: PolicyState) -> tuple[int, PolicyState]:
        since = evidence.healthy_since_restore
        again = state.learner_step >= 0 and since is not None and since < self.thresholds.blame.calm
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
        where = _where(fault, evidence)
        failed, state = state.unproven.count(where), state.restored(evidence.step, where)
        plain = all(isinstance(step, (Restore, RestoreScale)) for step in plan)
        if failed >= (self.thresholds.same_restores if plain else self.thresholds.corrected_restores):
            reason = f"the fault came back after each of {failed} rollbacks, before another snapshot was certified"
            return _end(fault, evidence, reason), state
        here = state.restores_of(where)
        if len(state.restores) > self.budget.max_rollbacks or here > self.budget.max_rollbacks_per_place:
            total = f"{len(state.restores) - 1} rollbacks within {self.budget.window} updates"
            limit = "max_rollbacks" if len(state.restores) > self.budget.max_rollbacks else "max_rollbacks_per_place"
            reason = f"the budget is used up: {total}, {here - 1} of them for this fault"
            return _end(fault, evidence, reason, limit), state
        return plan, state


def _end(fault: Fault, evidence: Evidence, reason: str, limit: str = "") -> Plan:
    """The plan if nothing more can be tried. A run that stays finite goes on, as it would without the guard."""
    return (Stop(reason, limit),) if fault.certain or evidence.corrupt is not None else ()


def _where(fault: Fault, evidence: Evidence | None = None) -> str:
    cause, place = ("", "") if evidence is None else evidence.redo_cause
    return f"{place} bad ({cause})" if cause else f"{fault.kind} at {fault.place}"


def depth_by_level(depth: int, evidence: Evidence, *, same_level: float, keeps: bool) -> int:
    """Number of snapshots to go back: at least ``depth``, and more while an older one has a clearly lower loss.

    Args:
        depth: Depth to begin with; 0 is the newest snapshot.
        evidence: Levels and unit of the loss.
        same_level: Loss units within which two snapshots have the same level.
        keeps: Whether to begin at a newer snapshot if the one at ``depth`` would lose half of what was learned.
    """
    levels = evidence.levels
    depth = min(depth, max(0, len(levels) - 1))
    known = [level for level in levels if level is not None]
    if not known:
        return depth
    best = min(known)
    keeps = keeps and best < evidence.first
    while keeps and depth > 0 and (level := levels[depth]) is not None and level - best > evidence.first - level:
        depth -= 1
    for index in range(depth, len(levels)):
        level = levels[index]
        if level is None or level <= best + same_level * evidence.loss_unit:
            return index
    return depth
