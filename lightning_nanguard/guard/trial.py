"""Makes trials: trains copies of an old state at lower rates on the batches of the run, and compares them with it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, final

from lightning_nanguard.decide.trial import (
    TrialLosses,
    is_enough,
    judge_trial,
    lead,
    may_begin,
    pick_arm,
)
from lightning_nanguard.guard.branch import Branch, Branches
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.control import NOT_ALIKE, Control, OutsideMove
from lightning_nanguard.guard.found import FoundFault, ShownTrial
from lightning_nanguard.guard.loop import TrainingLoop
from lightning_nanguard.record.trials import HeldTrial, Outcome
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.thresholds.trial import TrialThresholds
from lightning_nanguard.types import Fault, Reading, Trial


@dataclass(slots=True)
class _Arm:
    factor: float
    branch: Branch
    losses: list[float] = field(default_factory=list)

    @property
    def from_best(self) -> bool:
        """Whether it continues from the best snapshot, at the present rate."""
        return self.factor == 1

    def newest(self, batches: int) -> float:
        return _mean(self.losses[-batches:])


@dataclass(slots=True)
class _Comparison:
    """A comparison of an arm with the states on the newest batches, up to the update at which it is judged.

    Attributes:
        arm: The arm.
        batches: Number of batches.
        limits: What the comparison has to show.
        final: Whether the trial ends with it.
        under: Losses so far under each of the states, and those of the run.
        open: Whether the arm leads so far. Half of the batches show it.
    """

    arm: _Arm
    batches: int
    limits: TrialThresholds
    final: bool
    under: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    open: bool = True

    @property
    def complete(self) -> bool:
        """Whether all batches are compared."""
        return self.open and len(self.under["later"]) == self.batches

    def add(self, name: str, loss: float) -> None:
        """Add the loss of the newest batch under a state."""
        known = self.under[name]
        known.append(loss)
        if name != "best" and 2 * len(known) >= self.batches:  # the run may have lost what it had learned in the best
            self.open &= lead(self.arm.losses[-len(known) :], known, self.limits) > 0


@dataclass(slots=True)
class _Running:
    """A trial that has begun, with the losses so far.

    Attributes:
        fault: The suspicion that the trial tests.
        begun: The update after which it began.
        begun_step: ``global_step`` at its beginning.
        rate: State of the learning-rate multiplier at its beginning.
        states: The states compared with the arm on the last batches: the start, the best one and the present one.
        arms: The arms. After the pick only the best two.
        before: Updates that an earlier trial made from the start, if the arms continue from its arm.
        updates: Updates of each arm.
        earlier: For some batches from before the trial, the functions that give their losses.
        start: Losses under the start, before the pick.
        comparison: The present comparison; ``None`` before the first one.
    """

    fault: Fault
    begun: int
    begun_step: int
    rate: Mapping[str, Any]
    states: dict[str, Snapshot]
    arms: list[_Arm]
    before: int = 0
    earlier: Sequence[Callable[[], float | None]] = ()
    updates: int = 0
    start: list[float] = field(default_factory=list)
    comparison: _Comparison | None = None


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
        self._running: _Running | None = None
        self._asked_again = False  # whether a trial was requested while another one was running
        self._made = 0  # updates of the arms of all trials
        self._begun_again = False  # whether the rate fell during the newest trial, and it was begun again
        self._newest: tuple[int, float, float] | None = None  # newest trial: update, ratio, highest rate so far

    @property
    def running(self) -> bool:
        """Whether a trial runs."""
        return self._running is not None

    @property
    def outside(self) -> OutsideMove | None:
        """How far code outside of the optimizer's step moves the weights, if that rules trials out."""
        return self._control.outside

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
            if asked_again and self._asks_anew():  # the trial has answered any other request since it began
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
        if arm is None and not (self._asks_anew() or may_begin(fault, self._made, self._context.state.step, limits)):
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
            fallen = arm is None and len(arms) < room and self._has_fallen(best.step)
            if fallen and (again := self._branches.of(best)) is not None:
                arms.append(_Arm(1.0, again))
        states = {name: branch.state for name, branch in made.items() if branch is not None}
        if len(states) < len(bases) or not arms:
            return False
        states.setdefault("best", states["start"])
        if arm is None:
            self._control.begin()
        earlier, rate = self._context.replay.earlier(), self._context.rate
        self._newest = self._context.state.step, rate.ratio(), self._survived()
        self._running = _Running(
            fault,
            self._context.state.step,
            self._loop.clock()[0],
            rate.state_dict(),
            states,
            arms,
            before=0 if arm is None else arm.healthy,
            earlier=earlier[: min(self._context.ranks.gather(len(earlier)))],
        )
        return True

    def _asks_anew(self) -> bool:
        """Whether the rate is new since the newest trial: the guard has cut it, or it is far above all rates before."""
        if self._newest is None:
            return True
        step, ratio, survived = self._newest
        highest = max((one for since, one in self._context.state.rates if since > step), default=0.0)
        now = self._context.rate.ratio()
        cut = now < ratio and not math.isclose(now, ratio)
        return cut or highest > survived <= highest / self._limits.changed

    def _survived(self) -> float:
        """The highest rate since the last rollback. A trial tests what the run has become, and so all these rates."""
        state, rate, newest = self._context.state, self._context.rate, self._newest
        if rate.ratio() < 1:
            return rate.first() or 0.0  # a higher one has failed
        first = 0 if state.healthy_since_restore is None else state.step - state.healthy_since_restore + 1
        before = 0.0 if newest is None or state.rolled_back_since(newest[0]) else newest[2]
        return max(before, state.highest_rate(first))

    def _has_fallen(self, since: int) -> bool:
        """Whether the rate was far higher since an update than it is now, as after a peak of a schedule."""
        highest, rate = self._context.state.highest_rate(since), self._context.rate.first()
        return rate is not None and highest > 0 and highest >= self._limits.changed * rate

    def state_dict(self) -> dict[str, Any]:
        """The state in plain containers."""
        return {"made": self._made, "newest": self._newest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`. The state may be empty."""
        self._made, newest = int(state.get("made", 0)), state.get("newest")
        self._newest = None if newest is None else (int(newest[0]), float(newest[1]), float(newest[2]))

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

        Args:
            readings: Its readings.

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
        if self._has_fallen(running.begun) and not self._begun_again:
            # The factors of the arms belong to the higher rate. Under a schedule that falls again and again, the next
            # trial goes on.
            self._end("no result", "the scheduled learning rate fell meanwhile")
            self._newest, self._begun_again = None, True
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
                if compared is None or not (compared.complete or (compared.final and not compared.open)):
                    return None
                running.comparison = None
                losses = self._losses(running, compared) if compared.open else None
        if losses is None and compared.open:
            self._end("no result", "the batches before it could not be run again")
            return None
        trial = self._judge(running, compared, losses)
        return None if trial is None else FoundFault(running.fault, reading, shown=trial)

    def _judge(self, running: _Running, compared: _Comparison, losses: TrialLosses | None) -> ShownTrial | None:
        """End the trial, and return what it has shown; ``None`` if more updates may show more."""
        arm = compared.arm
        trial = Trial() if losses is None else judge_trial(losses, compared.limits)
        if not compared.final:
            # The arms of a second trial are all near the best rate of the first one.
            found = running.before > 0 or self._is_best(running, arm)
            if not (found and trial.lacks > 0 and is_enough(trial, 1, self._limits)):
                return None
        if trial.lacks > 0 and not arm.from_best:
            # At which rate to go on shows best in the newest batches: a higher rate may have caught up.
            newest = slice(-self._judged(running.updates), None)
            arm = self._best([one for one in running.arms if not one.from_best], newest)
            trial = replace(trial, factor=arm.factor)
        arm.branch.state.healthy = running.before + len(arm.losses)
        if trial.lacks > 0 and self._newest is not None and any(one.factor < arm.factor for one in running.arms):
            # The rate that the run will have has been tried, and a lower one is not better.
            _, ratio, highest = self._newest
            self._newest = self._context.state.step, ratio * arm.factor, highest * arm.factor
        self._begun_again = False
        self._end("confirmed" if trial.lacks > 0 else "not confirmed", "", trial.lacks, trial.factor)
        return ShownTrial(trial, arm.branch.state)

    def _best(self, arms: Sequence[_Arm], part: slice) -> _Arm:
        levels = [_mean(arm.losses[part]) for arm in arms]
        history = self._context.monitors.history(0)
        first = None if history is None else history.first
        return arms[pick_arm([arm.factor for arm in arms], levels, first, self._limits)]

    def _is_best(self, running: _Running, arm: _Arm) -> bool:
        """Whether an arm is better than all others, so that its rate is clearly the right one of those tried."""
        judged = -self._judged(running.updates)
        others = (one for one in running.arms if one is not arm)
        return all(lead(arm.losses[judged:], other.losses[judged:], self._limits) > 0 for other in others)

    def _losses(self, running: _Running, compared: _Comparison) -> TrialLosses | None:
        arm, under = compared.arm, compared.under
        now = self._branches.losses_of(running.earlier, running.states["now"])
        then = self._branches.losses_of(running.earlier, arm.branch.state)
        if now is None or then is None:
            return None
        newest = under["later"], arm.losses[-compared.batches :]
        return TrialLosses(under["start"], under["best"], under["now"], *newest, arm.factor, now, then)

    def _advance(self, running: _Running, loss: float) -> bool:
        for arm in running.arms:
            found = self._branches.train(arm.branch)
            if found is None:
                return False
            arm.losses.append(found)
            self._made += 1
        running.updates += 1
        limits, left = self._limits, self._limits.picked_after - running.updates
        if 0 <= left < self._judged(limits.picked_after) and not running.before:
            found = self._branches.loss(running.states["start"])
            if found is None:
                return False
            running.start.append(found)
        if left == 0:
            return self._pick(running)
        for end in (limits.updates // 2, limits.updates):
            # Decide by other batches than those that the arm is picked by.
            batches = self._judged(end)
            if running.updates == end - batches + 1:
                arm = self._best(running.arms, slice(-batches - 1, -1))
                final = end == limits.updates
                # In ordered data a few batches may all be of a kind. So more of them are left out before the end.
                strict = limits if final else replace(limits, left_out=limits.left_out_early)
                running.comparison = _Comparison(arm, batches, strict, final)
        return self._compare(running, loss)

    def _compare(self, running: _Running, loss: float) -> bool:
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

    def _pick(self, running: _Running) -> bool:
        """Keep the best arms; try lower rates, too, if even the best arm raises the loss."""
        limits, restarts = self._limits, [arm for arm in running.arms if not arm.from_best]
        newest = limits.picked_after // 2
        best, lowest = min(restarts, key=lambda arm: arm.newest(newest)), min(arm.factor for arm in restarts)
        nearest = sorted(restarts, key=lambda arm: (arm.factor > best.factor, abs(math.log(arm.factor / best.factor))))
        ahead = [arm for arm in running.arms if arm.from_best and arm.newest(newest) < best.newest(newest)]
        running.arms = [*nearest[: limits.picked], *ahead]
        # A continued arm has shown that it learns.
        learns = bool(running.before or ahead)
        if not learns and lowest > limits.least_factor and self._raises_the_loss(running, best):
            # In ordered data it may be the newest batches that raise it. So the best arms go on beside the lower rates.
            lower = [lowest * factor for factor in limits.factors[: max(0, self._room())]]
            more = self._arms(running.states["start"], lower)
            if more:
                running.arms += more
                running.updates, running.start = 0, []
        return bool(running.arms)

    def _raises_the_loss(self, running: _Running, arm: _Arm) -> bool:
        """Whether an arm that began at the start is worse than the start on the newest batches."""
        judged = -self._judged(self._limits.picked_after)
        return lead(running.start[judged:], arm.losses[judged:], self._limits) > 0

    def _arms(self, base: Snapshot, factors: Sequence[float]) -> list[_Arm]:
        branches = [(factor, self._branches.of(base, factor)) for factor in factors]
        arms = [_Arm(factor, branch) for factor, branch in branches if branch is not None]
        return arms if len(arms) == len(factors) else []

    def _room(self) -> int:
        # Memory is needed for copies of the start, the best and the present state, for the control, and for one copy
        # during training.
        return self._branches.room() - 7

    def _judged(self, updates: int) -> int:
        return updates // self._limits.judged_part


def _mean(losses: Sequence[float]) -> float:
    mean = fmean(losses)
    return mean if math.isfinite(mean) else math.inf
