"""A trial beside the run: its arms take the batches of the run as they come, where too few can be kept for one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import final

from lightning_nanguard.decide.trial import TrialLosses, judge_trial
from lightning_nanguard.guard.branch import Branch, Branches
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.found import FoundFault
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.types import Fault, Reading, Trial


@dataclass(slots=True)
class _Arm:
    factor: float
    branch: Branch
    losses: list[float] = field(default_factory=list)


@dataclass(slots=True)
class _Running:
    """A trial that has begun, with the losses so far."""

    fault: Fault
    begun: int
    states: dict[str, Snapshot]
    arms: list[_Arm]
    updates: int = 0
    later: list[float] = field(default_factory=list)
    under: dict[str, list[float]] = field(default_factory=dict)


@final
class LiveTrial:
    """Trains restarts with lower rates beside the run. Each loss is measured before the update on its batch, so that
    every batch is new to the run and to the arms alike.

    Args:
        context: What the parts of the guard share.
        branches: Trains the arms.
    """

    def __init__(self, context: GuardContext, branches: Branches) -> None:
        self._context = context
        self._branches = branches
        self._limits = context.thresholds.trial
        self._running: _Running | None = None
        self._shown: tuple[Trial | None, Snapshot | None] = None, None

    @property
    def running(self) -> bool:
        """Whether a trial runs."""
        return self._running is not None

    def take_shown(self) -> tuple[Trial | None, Snapshot | None]:
        """What the trial that has just ended showed, and the state of its arm; once."""
        shown, self._shown = self._shown, (None, None)
        return shown

    def begin(
        self, fault: Fault, start: Snapshot, best: Snapshot, *, arm: Snapshot | None = None, factor: float = 1.0
    ) -> bool:
        """Begin a trial, unless one runs already.

        Args:
            fault: The suspicion.
            start: The oldest certified snapshot.
            best: The certified snapshot of the lowest loss level.
            arm: What an earlier trial has trained from the start: the arms go on from there, at about its rate.
            factor: What the rate was multiplied by for it.

        Returns:
            Whether one runs now.
        """
        if self._running is not None or not self._branches.possible():
            return self._running is not None
        limits, factors = self._limits, self._limits.factors_by_use
        if arm is not None:
            factors = tuple(factor * near for near in limits.near)
        # Copies of the start, the best and the present state are kept to compare with, and one while an arm is trained.
        room = limits.live_bytes // max(1, start.nbytes()) - 4
        if room < 1:
            return False
        bases = {"start": start, "best": best, "now": None}
        states = {name: branch.state for name, base in bases.items() if (branch := self._branches.of(base)) is not None}
        tried = {one: self._branches.of(arm or start, one) for one in factors[:room]}
        arms = [_Arm(one, branch) for one, branch in tried.items() if branch is not None]
        if len(states) < len(bases) or len(arms) < len(tried):
            return False
        self._running = _Running(fault, self._context.state.step, states, arms, under={name: [] for name in states})
        return True

    def cancel(self) -> None:
        """The run has left the state that the trial is about."""
        self._running = None

    def after(self, readings: Sequence[Reading]) -> FoundFault | None:
        """Go on with the trial after a healthy update.

        Args:
            readings: Its readings.

        Returns:
            The suspicion that it is about, where it ends with this update; :meth:`take_shown` gives what it showed.
        """
        running = self._running
        if running is None:
            return None
        reading = readings[-1]
        if self._context.state.rolled_back_since(running.begun):
            self._running = None  # it is about a state that the run has left
            return None
        with self._context.replay.showing(reading.step) as shown:
            if not shown or reading.loss is None or not self._advance(running, reading.loss):
                self._running = None
                return None
        if running.updates < self._limits.updates:
            return None
        self._running = None
        (arm,) = running.arms
        judged = -self._judged()
        start, best, now = (running.under[name] for name in ("start", "best", "now"))
        losses = TrialLosses(start, best, now, running.later[judged:], arm.losses[judged:], arm.factor)
        self._shown = judge_trial(losses, self._limits), arm.branch.state
        return FoundFault(running.fault, reading)

    def _advance(self, running: _Running, loss: float) -> bool:
        limits = self._limits
        if running.updates >= limits.updates - self._judged():
            for name, state in running.states.items():
                found = self._branches.loss(state)
                if found is None:
                    return False
                running.under[name].append(found)
        for arm in running.arms:
            found = self._branches.train(arm.branch)
            if found is None:
                return False
            arm.losses.append(found)
        running.later.append(loss)
        running.updates += 1
        if running.updates == limits.picked_after:
            running.arms = [min(running.arms, key=_newest)]
        return True

    def _judged(self) -> int:
        return self._limits.updates // self._limits.judged_part


def _newest(arm: _Arm) -> float:
    mean = fmean(arm.losses[len(arm.losses) // 2 :])
    return mean if math.isfinite(mean) else math.inf
