"""Makes trials: trains copies of an old state at lower rates on the batches of the run, and compares them with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

from lightning_nanguard.decide.trial import TrialLosses, is_enough, judge_trial, may_begin
from lightning_nanguard.guard.branch import Branches
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.control import NOT_ALIKE, Control
from lightning_nanguard.guard.found import FoundFault, ShownTrial
from lightning_nanguard.guard.loop import TrainingLoop
from lightning_nanguard.guard.rates_tried import RatesTried
from lightning_nanguard.guard.running_trial import Arm, ArmComparison, RunningTrial
from lightning_nanguard.record.trials import HeldTrial, Outcome
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.types import Fault, Reading, Trial


@final
class TrialRunner:
    """Tests whether a lower rate learns what the run does not.

    The arms are trained on the batches of the run, with the same random numbers. Each loss is measured before the
    update on its batch, so every batch is new both to the run and to the arms. The run itself does not change.
    With several ranks each trains on its own batches, and all continue from the mean.

    Args:
        context: Objects and settings that the parts of the guard share.
        branches: Trains the arms.
        control: Finds out whether branches make the updates of the run.
        loop: Gives the present ``global_step`` and the number of updates that are left.
    """

    def __init__(self, context: GuardContext, branches: Branches, control: Control, loop: TrainingLoop) -> None:
        self._context = context
        self._branches = branches
        self._control = control
        self._loop = loop
        self._limits = context.thresholds.trial
        self._rates = RatesTried(context)
        self._running: RunningTrial | None = None
        self._asked_again = False  # whether a trial was requested while another one was running
        self._made = 0  # updates of the arms of all trials
        self._begun_again = False  # whether the rate fell during the newest trial, and it was begun again

    @property
    def running(self) -> bool:
        """Whether a trial runs."""
        return self._running is not None

    def hindrance(self, *, run: bool = True) -> str:
        """Why no trial can be made now, in words; ``""`` if one can, or if memory is too short for it.

        Args:
            run: Whether the present batch may be run once to find out. Otherwise only what is known of the run is said.
        """
        if self._control.failed:
            return NOT_ALIKE
        hindrance = self._branches.hindrance(run=run)
        if hindrance or not run:
            return hindrance
        left = min(self._context.ranks.gather(self._loop.updates_left()))
        return "the run ends before a trial would" if left < self._limits.updates else ""

    def pursue(self, found: FoundFault, start: Snapshot, best: Snapshot) -> None:
        """Begin the trial that a suspicion calls for.

        Args:
            found: The suspicion, with the trial that has just tested it, if one has.
            start: The oldest certified snapshot.
            best: The certified snapshot of the lowest loss level.
        """
        fault, shown, limits = found.fault, found.shown, self._limits
        if shown is None:
            self._asked_again = self.running
            self.begin(fault, start, best)
            return
        asked_again, self._asked_again = self._asked_again, False
        in_a_row = self._context.state.policy.trials_confirmed + 1
        if shown.trial.lacks == 0:
            if asked_again and self._rates.is_new():  # the trial has answered any other request since it began
                self.begin(fault, start, best)
        elif not is_enough(shown.trial, in_a_row, limits):
            # Its arm goes on beside the run. The run continues from the arm if it stays ahead.
            self.begin(fault, start, best, arm=shown.arm, factor=shown.trial.factor)

    def begin(
        self, fault: Fault, start: Snapshot, best: Snapshot, *, arm: Snapshot | None = None, factor: float = 1.0
    ) -> bool:
        """Begin a trial, unless one runs already.

        Args:
            fault: The suspicion.
            start: The oldest certified snapshot.
            best: The certified snapshot of the lowest loss level.
            arm: The arm of an earlier trial, if the new arms continue from it, at about its rate.
            factor: Factor on the rate of that arm.

        Returns:
            Whether a trial is running now.
        """
        if self._running is not None or self.hindrance():
            return self._running is not None
        limits, base = self._limits, arm or start
        if arm is None and not (self._rates.is_new() or may_begin(fault, self._made, self._context.state.step, limits)):
            return False
        room = self._room()
        factors = limits.factors if arm is None else tuple(factor * near for near in limits.near)
        if room < 1:
            return False
        bases = {"now": None, "start": start} | ({} if best.step == start.step else {"best": best})
        with self._branches.beside() as possible:
            if not possible:
                return False
            made = {name: self._branches.of(one) for name, one in bases.items()}
            arms = self._arms(base, factors[:room])
            # The run may have been ruined at a higher rate than it has now.
            fallen = arm is None and len(arms) < room and self._rates.has_fallen(best.step)
            if fallen and (again := self._branches.of(best)) is not None:
                arms.append(Arm(1.0, again))
        states = {name: branch.state for name, branch in made.items() if branch is not None}
        if len(states) < len(bases) or not arms:
            return False
        states.setdefault("best", states["start"])
        if arm is None:
            self._control.begin()
        earlier = self._context.replay.earlier()
        self._rates.note()
        self._running = RunningTrial(
            fault,
            self._context.state.step,
            self._loop.clock()[0],
            self._context.rate.state_dict(),
            states,
            arms,
            limits,
            before=0 if arm is None else arm.healthy,
            earlier=earlier[: min(self._context.ranks.gather(len(earlier)))],
        )
        return True

    def state_dict(self) -> dict[str, Any]:
        """The state in plain containers."""
        return {"made": self._made} | self._rates.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`. The state may be empty."""
        self._made = int(state.get("made", 0))
        self._rates.load_state_dict(state)

    def cancel(self) -> None:
        """Cancel the trial, because the run is over."""
        self._end("no result", "the run ended first")

    def _end(self, outcome: Outcome, reason: str = "", lacks: float = 0.0, factor: float = 1.0) -> None:
        running, self._running = self._running, None
        if running is not None:
            begun, now = running.begun_step, self._loop.clock()[0]
            held = HeldTrial(begun, now, running.fault.kind, outcome, lacks, factor, reason)
            self._context.trials.give(held)

    def after(self, readings: Sequence[Reading]) -> FoundFault | None:
        """Continue the trial after a healthy update.

        Returns:
            The suspicion, with what the trial has shown, if it ends with this update.
        """
        running, reading = self._running, readings[-1]
        if running is None or reading.step <= running.begun:
            return None
        if self._context.rate.state_dict() != running.rate:
            # The factors of the arms belong to a rate that the run no longer has.
            self._end("no result", "the learning rate was changed meanwhile")
            return None
        if self._rates.has_fallen(running.begun) and not self._begun_again:
            # The factors of the arms belong to the higher rate. Under a schedule that falls again and again, the next
            # trial goes on.
            self._end("no result", "the scheduled learning rate fell meanwhile")
            self._rates.forget()
            self._begun_again = True
            return FoundFault(running.fault, reading)
        with self._context.replay.showing(reading.step) as shown:
            at_hand = all(self._context.ranks.gather(shown and reading.loss is not None))
            with self._branches.beside(reading.step) as possible:
                alike = at_hand and possible and self._control.follow(reading.step)
                if not (alike and self._advance(running, reading.loss or 0.0)):
                    failed = self._control.failed
                    self._end("no result", NOT_ALIKE if failed else "a batch could not be run again")
                    # No further trial is made, so the user is told of the suspicion.
                    return FoundFault(running.fault, reading) if failed else None
                compared = running.comparison
                if compared is None or not compared.over:
                    return None
                running.comparison = None
                losses = self._losses(running, compared) if compared.open else None
        if losses is None and compared.open:
            self._end("no result", "the batches before it could not be run again")
            return None
        trial = self._judge(running, compared, losses)
        return None if trial is None else FoundFault(running.fault, reading, shown=trial)

    def _judge(self, running: RunningTrial, compared: ArmComparison, losses: TrialLosses | None) -> ShownTrial | None:
        """End the trial, and return what it has shown; ``None`` if more updates may show more."""
        arm = compared.arm
        trial = Trial() if losses is None else judge_trial(losses, compared.limits)
        if not compared.final:
            # The arms of a second trial are all near the best rate of the first one.
            found = running.before > 0 or running.is_best(arm)
            if not (found and trial.lacks > 0 and is_enough(trial, 1, self._limits)):
                return None
        if trial.lacks > 0 and not arm.from_best:
            arm = running.best_now(self._context.monitors.history(0).first)
            trial = replace(trial, factor=arm.factor)
        arm.branch.state.healthy = running.before + len(arm.losses)
        if trial.lacks > 0 and any(one.factor < arm.factor for one in running.arms):
            self._rates.note_arm(arm.factor)
        self._begun_again = False
        self._end("confirmed" if trial.lacks > 0 else "not confirmed", "", trial.lacks, trial.factor)
        return ShownTrial(trial, arm.branch.state)

    def _losses(self, running: RunningTrial, compared: ArmComparison) -> TrialLosses | None:
        arm, under = compared.arm, compared.under
        ranks, present = self._context.ranks, self._branches.present
        during = running.during[: min(ranks.gather(len(running.during)))]
        run = self._branches.losses_of(running.earlier, running.states["now"])
        run_since = None if present is None else self._branches.losses_of(during, present)
        ours = self._branches.losses_of([*running.earlier, *during], arm.branch.state)
        if run is None or run_since is None or ours is None:
            return None
        newest = under["later"], arm.losses[-compared.batches :]
        return TrialLosses(under["start"], under["best"], under["now"], *newest, arm.factor, run + run_since, ours)

    def _advance(self, running: RunningTrial, loss: float) -> bool:
        for arm in running.arms:
            found = self._branches.train(arm.branch)
            if found is None:
                return False
            arm.losses.append(found)
            self._made += 1
        running.updates += 1
        if running.updates % self._limits.kept_every == 0:
            running.during += self._context.replay.earlier()[-1:]
        if running.measures_start:
            found = self._branches.loss(running.states["start"])
            if found is None:
                return False
            running.start.append(found)
        if running.updates == self._limits.picked_after:
            return self._pick(running)
        running.compare_if_due(self._context.monitors.history(0).first)
        return self._compare(running, loss)

    def _compare(self, running: RunningTrial, loss: float) -> bool:
        """Compare the arm with the states on the present batch, and return whether its losses are known."""
        compared, states = running.comparison, running.states
        if compared is None:
            return True
        compared.add("later", loss)
        for name in ("start", "now", "best"):
            if not compared.open:
                break
            again = name == "best" and states["best"] is states["start"]
            found = compared.under["start"][-1] if again else self._branches.loss(states[name])
            if found is None:
                return False
            compared.add(name, found)
        return True

    def _pick(self, running: RunningTrial) -> bool:
        """Keep the best arms; try lower rates, too, if even the best arm raises the loss."""
        lower = running.pick()
        if lower and (more := self._arms(running.states["start"], lower[: max(0, self._room())])):
            running.extend(more)
        return bool(running.arms)

    def _arms(self, base: Snapshot, factors: Sequence[float]) -> list[Arm]:
        branches = [(factor, self._branches.of(base, factor)) for factor in factors]
        arms = [Arm(factor, branch) for factor, branch in branches if branch is not None]
        return arms if len(arms) == len(factors) else []

    def _room(self) -> int:
        # Memory is needed for copies of the start, the best and the present state, for the control, and for one copy
        # during training.
        return self._branches.room() - 7
