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
from dataclasses import dataclass, field, replace
from typing import Protocol

from lightning_nanguard.decide.blame import AT_ONCE, CALM, learner_did_it, rate_rises
from lightning_nanguard.decide.budget import Budget
from lightning_nanguard.decide.depth import by_level
from lightning_nanguard.decide.state import PolicyState, within_window
from lightning_nanguard.types import Clip, Evidence, Fault, Plan, PlanStep, Restore, Scale, Scope, Skip, Stop

# A rate of at least this share of one that failed counts as that one.
_ACROSS = 0.75


# Matrices of good runs grew to at most 9 times their norm in first trials, ruined ones to 15 and far more.
RUINED = 12.0


class Proposes(Protocol):
    """What the policy sees of a remedy."""

    @property
    def word(self) -> str:
        """Short name, as it stands in the records."""

    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        """What this remedy would do at the given attempt (0 at first, +1 each time the trouble comes back soon)."""


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
    budget: Budget = field(default_factory=Budget)
    patience: int = 4
    calm: int = CALM

    def decide(self, fault: Fault, evidence: Evidence, state: PolicyState) -> tuple[Plan, PolicyState]:
        """The plan for a fault; an empty plan says that it was none."""
        state = within_window(state, evidence.step - self.budget.window)
        if evidence.healthy_steps == 0 and evidence.bad_in_a_row >= self._start_patience(evidence):
            return (Stop(f"no update was ever good: the first {evidence.bad_in_a_row} were all bad"),), state
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
            return "learner" if evidence.rate_rose and fault.kind == "implausible_state" else "state"
        if fault.kind == "implausible_statistics":
            return "batch"
        if evidence.corrupt is not None:
            return "learner" if evidence.climbing or evidence.rate_rose else "state"
        if evidence.jump is not None and fault.scope == "batch":
            return "learner" if learner_did_it(evidence, self.calm) else "state"
        if fault.scope == "learner":
            return self._confirm(fault, evidence)
        if evidence.batch_finite is False:
            return "batch"
        if evidence.batch_strange:
            return "batch"
        comparison = evidence.comparison
        if comparison is not None and comparison.worse(0.5 * evidence.loss_unit, sane=self._sane(evidence)):
            return "learner" if learner_did_it(evidence, self.calm) else "state"
        if evidence.undo and comparison is None and evidence.healthy_since_restore is not None:
            return "learner" if evidence.healthy_since_restore < AT_ONCE else "batch"
        if comparison is not None and comparison.then_finite is False:
            return "batch"  # and going back would bring it back: a loss that cannot be differentiated there
        if evidence.healthy_steps == 0 or evidence.healthy_since_restore == 0:
            return "batch"  # the state is as good as any that is known
        if fault.kind == "gradient_spike" and evidence.comparable:
            return "batch"  # finite, under good weights: if it lasts, it is how gradients are from now on
        if evidence.bad_in_a_row >= self.patience and evidence.bad_in_a_row % self.patience == 0:
            # A stretch of bad batches under good weights is the data's fault, however long.
            data = comparison is not None and not comparison.then <= self._sane(evidence)
            return "batch" if data else "learner"
        return "batch"

    def _confirm(self, fault: Fault, evidence: Evidence) -> Scope | None:
        if not evidence.comparable and fault.kind in ("stuck_loss", "collapsed"):
            # Several losses that work against each other rise and fall by design.
            far = fault.value is not None and fault.value > evidence.first + 2 * abs(evidence.first)
            return "learner" if far and evidence.growth > _RUINED_BLINDLY else None
        if fault.kind == "overshoot":
            # A heavy-tailed loss rises as far; but then the weights stay where they are.
            return "learner" if evidence.growth > (RUINED if evidence.comparable else _RUINED_BLINDLY) else None
        if fault.kind == "stuck_loss":
            # A hard task looks the same in the loss: only the weights tell a ruined learner from it.
            return "learner" if self._ruined(fault, evidence) else None
        comparison = evidence.comparison
        if fault.kind == "unsteady_loss":
            # Data that swing do so under good weights too, which are no worse than untrained ones, or hardly.
            first = evidence.first
            ruined = comparison is not None and comparison.then < first + 0.1 * abs(first) and comparison.now > first
            return "learner" if ruined else None
        if comparison is None or fault.kind == "loss_scale_collapse":
            return "learner"
        if comparison.worse(0.1 * self._scale(fault, evidence), sane=self._sane(evidence)):
            return "learner"
        if comparison.better(0.1 * evidence.loss_unit):
            return None  # data that have changed, to which the model is on its way
        return "learner" if fault.kind == "collapsed" and self._ruined(fault, evidence) else None

    def _scale(self, fault: Fault, evidence: Evidence) -> float:
        if fault.kind == "exploding_loss" and fault.value is not None:
            # Where it is falling again it varies by as much as it is too high, and that is no noise.
            return min(evidence.loss_unit, abs(fault.value - evidence.first))
        return evidence.loss_unit

    def _sane(self, evidence: Evidence) -> float:
        return evidence.first + 10 * evidence.loss_unit

    def _ruined(self, fault: Fault, evidence: Evidence) -> bool:
        no_better = fault.value is not None and fault.value > evidence.first - 0.1 * evidence.loss_unit
        return (
            bool(evidence.lower_is_better)
            or evidence.growth > RUINED
            or (evidence.growth > 4 and evidence.excursion and no_better)
        )

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

    def _rewind(self, fault: Fault, evidence: Evidence, state: PolicyState, scope: Scope) -> tuple[Plan, PolicyState]:
        attempt, state = self._escalate(evidence, state) if scope == "learner" else (0, state)
        steps: list[PlanStep] = []
        corrected = False
        # A loss that explodes may do so by its rate or by rare large gradients: rehearsed under clipping, the rate is
        # cut no further than it must be.
        both = attempt > 0 or evidence.healthy_steps < 20 or fault.kind == "exploding_loss" or evidence.burst
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
                # A tensor gone bad was fine in every certified snapshot, whatever the look that found it was for.
                sound = evidence.sound if evidence.corrupt is None else None
                steps.append(Restore(by_level(max(depth, sound or 0), evidence, keeps=sound is None)))
            elif scope == "learner" and (not corrected or both):
                corrected = True
                if isinstance(proposal, Scale):
                    if attempt == 0 and self._peak_is_over(evidence, state):
                        continue
                    least = _proven_factor(proposal.factor, evidence, state)
                    clipped = attempt == 0 and any(isinstance(step, Clip) for step in steps)
                    proposal = replace(proposal, least=least, limit=rate_rises(evidence), clipped=clipped)
                steps.append(proposal)
        if any(isinstance(step, Stop) for step in steps):
            return tuple(steps), state
        restoring = any(isinstance(step, Restore) for step in steps)
        if evidence.undo and not restoring:
            steps, restoring = [Restore(0), *steps], True  # an update that was made is taken back in no other way
        comparison = evidence.comparison
        lost = evidence.corrupt is not None or (comparison is not None and not math.isfinite(comparison.now))
        if not restoring and (lost or not steps):
            if fault.since is not None and not lost:
                return (), state  # it may have come back by itself
            if fault.scope == "batch" and not lost:
                return self._skip(fault, evidence, state)
            return (Stop("the learner is lost and no remedy that could bring it back is allowed"),), state
        if restoring and evidence.snapshots == 0:
            return (Stop("the learner is lost before there was a good state to go back to"),), state
        if scope == "learner":
            rates = [rate for rate in (evidence.lr, evidence.highest_lr) if rate is not None]
            rate = max(rates, default=math.inf)
            bad = min(state.bad_rate, rate)
            state = replace(state, bad_rate=bad, given_back_at=evidence.healthy_steps)
            if state.proven_rate > bad / 4:
                state = replace(state, proven_rate=0.0, proven_level=math.inf)
        return self._count_restore(fault, evidence, state, tuple(steps))

    def _peak_is_over(self, evidence: Evidence, state: PolicyState) -> bool:
        # It diverged at a rate that the schedule has left since, for one at which it learned before.
        if evidence.lr is None or evidence.highest_lr is None:
            return False
        return evidence.lr <= state.proven_rate and evidence.highest_lr > 1.5 * evidence.lr

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
            total = f"{len(state.restores) - 1} rollbacks within {self.budget.window} updates"
            return (Stop(f"the budget is used up: {total}, {here - 1} of them for this"),), state
        return plan, state

    def give_back(
        self,
        evidence: Evidence,
        state: PolicyState,
        *,
        scheduled_lr: float | None,
        factor: float,
        after: int,
        learning: bool,
    ) -> tuple[Plan, PolicyState]:
        """Give back a step of the learning rate's cut after a healthy stretch.

        Up to a rate that was proven it goes at once, after a twentieth of ``after``; else a ``factor`` at a time after
        ``after`` healthy updates each, and across the lowest rate that failed only after four times as many, doubled
        for every time it failed again. A run that is not learning gets nothing back quickly.
        """
        if evidence.multiplier >= 1.0 or scheduled_lr is None:
            return (), state
        proven = min(1.0, state.proven_rate / scheduled_lr) if learning and scheduled_lr > 0 else 0.0
        if proven > evidence.multiplier:
            larger, wait = proven, max(1, after // 20)
        else:
            larger = min(1.0, evidence.multiplier / factor)
            wait = after
            if scheduled_lr * larger >= _ACROSS * state.bad_rate:
                wait = after * 2 ** min(state.failed_returns + 2, 10)
        if evidence.healthy_steps - state.given_back_at < wait:
            return (), state
        across = scheduled_lr * larger >= _ACROSS * state.bad_rate
        # Up to a proven rate as a limit: under a falling schedule a multiplier would have to follow it step by step.
        return (Scale(larger / evidence.multiplier, limit=proven > evidence.multiplier),), replace(
            state, given_back_at=evidence.healthy_steps, bad_rate=math.inf if across else state.bad_rate
        )

    def too_high(self, rate: float, healthy_steps: int, state: PolicyState) -> PolicyState:
        """A rate was found too high, though nothing diverged: it counts as one that failed, and nothing as proven."""
        return replace(
            state,
            bad_rate=min(state.bad_rate, rate),
            proven_rate=0.0,
            proven_level=math.inf,
            given_back_at=healthy_steps,
        )

    def prove(self, rate: float | None, level: float | None, margin: float, state: PolicyState) -> PolicyState:
        """A snapshot was certified while the run was learning.

        Its rate is proven only where the loss has fallen since the last proof: under a schedule that goes on rising, a
        run that has arrived bears rates at which it would never have got there.

        Args:
            rate: Effective learning rate.
            level: Level of the loss.
            margin: By how much the loss must have fallen.
            state: What is remembered.
        """
        if rate is None or level is None or level > state.proven_level - margin:
            return state
        proven = max(rate, state.proven_rate) if rate < _ACROSS * state.bad_rate else state.proven_rate
        return replace(state, proven_rate=proven, proven_level=level)


# Growth of the weights at which a run is lost, where no batch can be run again to prove it; sound ones reach 12.
_RUINED_BLINDLY = 25.0


def _proven_factor(factor: float, evidence: Evidence, state: PolicyState) -> float:
    if evidence.lr is None or evidence.lr <= 0:
        return 0.0
    highest = max(evidence.lr, evidence.highest_lr or 0.0)
    # Snapshots taken at about the rate that has just failed prove nothing.
    return min(factor, state.proven_rate / evidence.lr) if state.proven_rate <= highest / 4 else 0.0
