"""Handles a fault: collects evidence, decides, finds the cause, carries the plan out, and records it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, final

from lightning_nanguard.act.base import Remedy
from lightning_nanguard.decide.policy import Policy
from lightning_nanguard.decide.rate_limit import spare_rate, within_curvature
from lightning_nanguard.decide.state import PolicyState
from lightning_nanguard.diagnosis.case import Look
from lightning_nanguard.distributed.ranks import most_confident_over_ranks
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.found import FoundFault
from lightning_nanguard.guard.investigator import Investigator
from lightning_nanguard.guard.loop import Clock, TrainingLoop
from lightning_nanguard.guard.plan_runner import Applied, PlanRunner
from lightning_nanguard.guard.receipts import Receipts
from lightning_nanguard.guard.recorder import InterventionRecorder
from lightning_nanguard.guard.suspicions import Suspicions
from lightning_nanguard.state.restore import part_of_snapshot, weights_if_room
from lightning_nanguard.types import Evidence, Fault, Finding, Plan, PlanStep, Skip, Stop

Handled = Literal["healthy", "restored", "done"]
"""What became of a fault: its reading is healthy after all, the run has gone back to a snapshot, or neither."""


@final
@dataclass(eq=False)
class Interventions:
    """Handles the faults that were found.

    Args:
        context: Objects and settings that the parts of the guard share.
        loop: Runs the diagnosis, and gives the trainer's step, epoch and batch.
        policy: Decides on a plan.
        investigator: Gathers evidence.
        recorder: Records the intervention.
        runner: Carries the plan out.
        remedies: The remedy for each kind of plan step. It gives the word for the record.
        receipts: Compares the run with the branch that an intervention gave up.
        suspicions: Tells the user of faults that are left alone.
    """

    context: GuardContext
    loop: TrainingLoop
    policy: Policy
    investigator: Investigator
    recorder: InterventionRecorder
    runner: PlanRunner
    remedies: Mapping[type[PlanStep], Remedy]
    receipts: Receipts
    suspicions: Suspicions

    def handle(self, found: FoundFault) -> Handled:
        """Handle a fault.

        Returns:
            What became of it. A reading that is healthy after all belongs to the history.

        Raises:
            TrainingDivergedError: If the run cannot be saved.
        """
        context, state = self.context, self.context.state
        fault, reading = found.fault, found.reading
        # Undo first what the batch changed in the statistics of batch norm, so that it does not count as bad state.
        undo = fault.scope == "batch" and not found.reached
        before = self.runner.undo(found) if undo and found.undo is not None else {}
        known = self._known(found)
        with self.batch_of(found) as at_hand:
            evidence, ranks = self.investigator.look_into(found, known, at_hand=at_hand, before=before)
        if fault.only_if_corrupt and evidence.corrupt is None:
            self._record_only(found)
            return "done"
        if fault.scope == "learner" and not fault.certain and evidence.alone == "averages" and evidence.corrupt:
            # What is bad explains no suspicion of the learner, which the next reading raises again.
            message = f"{evidence.corrupt} is no longer finite"
            fault = Fault("corrupted_state", "state", evidence.corrupt, None, message)
            found = replace(found, fault=fault, undo=None, shown=None)
        found = replace(found, ranks=ranks or found.ranks)
        before_plan = state.policy
        plan, state.policy = self.policy.decide(fault, evidence, before_plan)
        if not plan:
            self.suspicions.leave(fault, reading, self._clock(found), evidence.trial)
            return self._dismiss(found)
        skipped = any(isinstance(step, Skip) for step in plan)
        self.investigator.conclude(fault, batch=skipped)
        done = self._act(found, evidence, plan, before_plan)
        lasts = state.bad_in_a_row >= context.thresholds.decision.blame.patience and not evidence.batch_strange
        if fault.scope == "batch" and not fault.certain and lasts:
            context.monitors.accept(reading)  # a lasting rise is the new usual level
        if done.restored is not None:
            return "restored"
        # Nothing was restored, so the fault will show again: accept its reading, and report it at growing intervals.
        stays = fault.scope == "learner" and reading.finite and reading.loss_finite
        return self._dismiss(found) if stays else "done"

    def _known(self, found: FoundFault) -> Evidence:
        """The evidence that needs no investigation."""
        state = self.context.state
        return Evidence(
            step=state.step,
            healthy_steps=state.healthy_steps,
            healthy_since_restore=state.healthy_since_restore,
            bad_in_a_row=max(1, state.bad_in_a_row),
            good_beside=state.good_beside,
            undo=found.reached,
        )

    def _record_only(self, found: FoundFault) -> None:
        """Record a fault that is none of the learner, which is finite: most likely the validation data are at fault."""
        fault, context = found.fault, self.context
        suggestion = (
            "the weights and buffers are finite, so the data or the code that gave this number are at fault. Look "
            "for NaN and Inf in the data, and for operations that are not defined for all of its values."
        )
        confidence = context.thresholds.diagnosis.confidence.suspicion
        finding = Finding(fault.kind, confidence, {}, fault.place, suggestion=suggestion)
        self.recorder.record(fault, (), context.rate.effective(), finding, found.ranks)

    def _dismiss(self, found: FoundFault) -> Handled:
        healthy = self.context.monitors.dismiss(found.reading) and found.reading.loss is not None
        return "healthy" if healthy else "done"

    @contextmanager
    def batch_of(self, found: FoundFault) -> Iterator[bool]:
        """Make the faulty batch the present one within the context, if it is stored; yield whether it is."""
        if found.late and found.undo is not None:
            with self.context.replay.showing(found.reading.step) as shown:
                if all(self.context.ranks.gather(shown)):
                    yield True
                    return
        yield not found.late

    def _diagnose(self, found: FoundFault, evidence: Evidence, look: Look) -> Finding | None:
        learner, tried = self.context.learner, found.tried
        own = None if tried is None else weights_if_room(learner)
        if tried is None or own is None:
            return self.loop.diagnose(found.fault, evidence, look, found.reading.step)
        with part_of_snapshot(learner, tried, own):
            finding = self.loop.diagnose(found.fault, evidence, look, found.reading.step)
        if finding is None:
            return None
        text = (
            f"{finding.suggestion} Only weights that the optimizer tried within its step show this: a lower learning "
            "rate keeps it closer to the present ones."
        )
        return replace(finding, scope="learner", suggestion=text)

    def _clock(self, found: FoundFault) -> Clock:
        return self.recorder.clock(found.reading.step if found.late else None, unmade=found.unmade)

    def _act(self, found: FoundFault, evidence: Evidence, plan: Plan, before_plan: PolicyState) -> Applied:
        """Find the cause of a fault, carry the plan out, and record it. If the plan fails, carry out another one."""
        context, rates = self.context, self.context.rate.effective()
        # Diagnose before the plan changes weights and batch.
        look = "nothing" if found.undo is None and evidence.trial is None else self.runner.look
        finding = most_confident_over_ranks(context.ranks, self._diagnose(found, evidence, look))
        plan = _rate_fitted(plan, finding, evidence, rates)
        self._keep_branch(found, evidence, plan)
        known_until = self._known_until(found, evidence)
        done = self.runner.apply(plan, found, known_until, corrupt=evidence.corrupt)
        if done.redo_failed and found.fault.rate_may_cause:
            # The updates made the state bad, so the learner is to blame.
            evidence = replace(evidence, redo_failed=True)
            plan, context.state.policy = self.policy.decide(found.fault, evidence, before_plan)
            finding = self._diagnose_again(found, evidence) or finding
            plan = _rate_fitted(plan, finding, evidence, rates)
            done = self.runner.apply(plan, found, known_until, corrupt=evidence.corrupt, may_redo=False)
        redone, redo_cause = done.redone and found.not_again(0) is None, context.state.redo_cause
        if redone or redo_cause not in (evidence.redo_cause, ("", "")):  # a rollback has shown it
            finding = self._diagnose_again(found, replace(evidence, redo_cause=redo_cause, redone=redone)) or finding
        self._record(found, evidence, done, finding, rates)
        return done

    def _diagnose_again(self, found: FoundFault, evidence: Evidence) -> Finding | None:
        return self.loop.diagnose(found.fault, evidence, "nothing", found.reading.step)

    def _known_until(self, found: FoundFault, evidence: Evidence) -> int:
        # If the learner is not to blame, keep the readings of its first updates through the restore. Otherwise
        # detectors might learn from data that are bad for a while.
        blameless = found.reached and self.context.state.policy.learner_step != evidence.step
        return min(found.reading.step - 1, self.context.thresholds.decision.blame.beginning) if blameless else 0

    def _keep_branch(self, found: FoundFault, evidence: Evidence, plan: Plan) -> None:
        """Keep the branch that a plan on finite evidence gives up, to be compared with the run."""
        ends = any(isinstance(step, Stop) for step in plan)
        if not ends and not found.fault.certain and self.context.settings.act_on == "evidence":
            skipped = any(isinstance(step, Skip) for step in plan)
            self.receipts.before(self.loop.clock()[0], skipped=skipped, tried=evidence.trial is not None)

    def _record(
        self, found: FoundFault, evidence: Evidence, done: Applied, finding: Finding | None, rates: Sequence[float]
    ) -> None:
        """Record what was done; end the run if it cannot go on."""
        observe, restored = self.context.settings.observe, done.restored
        words = tuple(self.remedies[type(step)].word for step in done.steps)
        words += ("redo",) if done.redone else ()
        fault = found.fault if evidence.corrupt is None else replace(found.fault, place=evidence.corrupt)
        clock = self._clock(found)
        made = 0 if found.arm is None else found.arm.healthy
        self.recorder.record(fault, words, rates, finding, found.ranks, clock, restored, made)
        if observe and self.context.state.told is None:
            self.suspicions.remember(found.fault, clock, "only observed", "Look at the batch of that update")
        if done.unrestored is not None:
            reason = f"the rollback did not help: {done.unrestored} is still not finite, and no snapshot restores it"
            self.recorder.stop(fault, reason, finding, clock, restored)
        stop = next((step for step in done.steps if isinstance(step, Stop)), None)
        if stop is not None and not observe:
            self.recorder.stop(fault, stop.reason, finding, clock, restored, stop.limit)
        self.recorder.tried(found.fault, words)


def _rate_fitted(plan: Plan, finding: Finding | None, evidence: Evidence, rates: Sequence[float]) -> Plan:
    plan = spare_rate(plan, finding, evidence)
    if evidence.trial is not None:  # the trial has shown which rate is right
        return plan
    return within_curvature(plan, finding, rates[0] if rates else None)
