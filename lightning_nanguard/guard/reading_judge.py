"""Separates healthy readings from faults, and keeps both until the end of the batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import final

from lightning_nanguard.distributed.ranks import first_over_ranks
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.found import FoundFault
from lightning_nanguard.guard.interventions import Interventions
from lightning_nanguard.guard.late_redo import LateRedo
from lightning_nanguard.guard.meter import Meter
from lightning_nanguard.guard.plan_runner import PlanRunner
from lightning_nanguard.guard.readback import Arrived
from lightning_nanguard.guard.suspicions import Suspicions
from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.state.plausibility import PlausibilityCheck
from lightning_nanguard.state.restore import weights_if_room
from lightning_nanguard.types import Fault, Reading


@final
@dataclass(eq=False)
class ReadingJudge:
    """Passes each reading to the detectors, and blocks the update if it is bad.

    Args:
        context: Objects and settings that the parts of the guard share.
        meter: Names the gradient that is not finite.
        runner: Blocks updates.
        interventions: Handles faults.
        suspicions: Tells the user of faults that are left alone.
        plausibility: Checks buffers.
        late: Makes updates again whose fault happened by chance.

    Attributes:
        readings: Healthy readings since the last batch ended.
        non_finite: Updates so far whose loss or gradient was not finite, without overflows that a GradScaler skips.
    """

    context: GuardContext
    meter: Meter
    runner: PlanRunner
    interventions: Interventions
    suspicions: Suspicions
    plausibility: PlausibilityCheck
    late: LateRedo
    _found: list[FoundFault] = field(default_factory=list, init=False)
    readings: list[Reading] = field(default_factory=list, init=False)
    non_finite: int = field(default=0, init=False)

    def weights_are_bad(self) -> bool:
        """Whether a bad update that was found since the last batch ended has reached the weights."""
        return any(one.reached for one in self._found) and not self.context.settings.observe

    def add(self, found: FoundFault | None) -> None:
        """Add a fault that was not found in a reading; it is handled at the end of the batch."""
        if found is not None:
            self._found.append(found)

    def judge_late(self, arrived: Iterable[Arrived], stepping: int | None) -> None:
        """Judge readings of earlier updates, up to the first fault.

        Args:
            arrived: The readings. No more are read than are judged.
            stepping: Index of the optimizer about to step, ``None`` if none is.
        """
        if self._found:
            return
        for one in arrived:
            self.judge(one, stepping)
            if self._found:
                return

    def judge(self, arrived: Arrived, stepping: int | None) -> None:
        """Judge one reading."""
        if self.context.curve is not None and not arrived.line_search:
            rates = self.context.state.rates
            self.context.curve.add(arrived.reading, rates[-1][1] if rates else None, self.context.clipper.value)
        # Further closures of one step (LBFGS) try bad points on purpose, so their readings do not enter the history.
        if not arrived.line_search and self.context.monitors.passes(arrived.reading):
            self.readings.append(arrived.reading)  # the usual case
        else:
            self._look_closer(arrived, stepping)
        if arrived.outside is not None:
            fault, ranks = arrived.outside
            self._found.append(FoundFault(fault, arrived.reading, late=True, ranks=ranks))

    def _look_closer(self, arrived: Arrived, stepping: int | None) -> None:
        reading, learner = arrived.reading, self.context.learner
        if learner.scaler is not None and reading.loss_finite and not reading.finite:
            reading = reading._replace(scaler_skips=True)
        reading = self._unusual(reading, late=arrived.late)
        self.non_finite += not (reading.finite or reading.scaler_skips or arrived.line_search)
        quasi_newton = reading.optimizer_index in learner.quasi_newton
        fault = self.context.monitors.check(reading, line_search=arrived.line_search, quasi_newton=quasi_newton)
        if fault is not None and not arrived.line_search and self._large_is_usual(fault, reading, late=arrived.late):
            reading = self.context.state.unusual(reading)
            fault = self.context.monitors.check(reading, line_search=arrived.line_search, quasi_newton=quasi_newton)
        if fault is not None and not fault.certain:
            fault = self._pursued(fault, arrived)
        if fault is None:
            if not arrived.line_search:
                self._accept(reading)
            return
        if not reading.loss_finite and self.context.state.raised is not None:
            fault = replace(fault, message=self.context.state.raised)
        if fault.place == "gradient" and not reading.finite and not arrived.late:
            named = self.meter.first_bad_gradient(reading.optimizer_index)
            fault = replace(fault, place=first_over_ranks(self.context.ranks, named)[0] or fault.place)
        reached = arrived.reached and fault.scope == "batch"
        found = FoundFault(fault, reading, arrived.undo, reached, arrived.late, arrived.ranks())
        if arrived.line_search:
            found = replace(found, line_search=True, tried=None if arrived.late else weights_if_room(learner))
        # A suspicion is no reason to skip the update: it is finite, and a rollback would undo it.
        suspicion = fault.scope == "learner" and not reading.scaler_skips
        if self.runner.at_once and not suspicion and not arrived.late:
            self.context.state.bad_in_a_row += 1
            # Handle it now: the update has not been made yet, as if an acting guard had skipped it.
            self.handle(replace(found, unmade=True))
            return
        self._found.append(found)
        if stepping is not None and not suspicion and (not arrived.late or arrived.reached):
            self.runner.block(stepping)

    def _unusual(self, reading: Reading, *, late: bool) -> Reading:
        """Remove from a reading the numbers that are usual in this run; tell the user once about them."""
        state = self.context.state
        new = reading.loss_is_bad_alone and not state.bad_losses_usual
        if new and state.note_bad_loss(reading.step, self.context.thresholds.decision.blame.patience):
            self.suspicions.tell_of_bad_losses(reading, late=late)
        return state.unusual(reading)

    def _large_is_usual(self, fault: Fault, reading: Reading, *, late: bool) -> bool:
        """Whether every gradient since the start was finite and too large, so that the update is made anyway."""
        state, patience = self.context.state, self.context.thresholds.decision.blame.patience_with_chance
        large = fault.certain and fault.scope == "batch" and reading.finite and not state.large_gradients_usual
        if not (large and state.note_large_gradient(patience)):
            return False
        self.context.finite.squares_overflow = True
        self.suspicions.tell_of_large_gradients(fault, reading, late=late)
        return True

    def _pursued(self, fault: Fault, arrived: Arrived) -> Fault | None:
        """The suspicion, ``None`` if nothing is done about it. It is certain if the inputs are extreme, too."""
        batch = fault.scope == "batch"
        if batch and fault.extreme and self._batch_is_strange(fault, arrived, extreme=True):
            return replace(fault, certain=True)
        if self.context.settings.act_on == "certain":
            self.suspicions.advise(fault, arrived.reading, late=arrived.late)
            return None
        strange = not (batch and fault.doubtful) or self._batch_is_strange(fault, arrived, extreme=False)
        return fault if strange else None

    def _batch_is_strange(self, fault: Fault, arrived: Arrived, *, extreme: bool) -> bool:
        found = FoundFault(fault, arrived.reading, arrived.undo, late=arrived.late)
        ranks, replay = self.context.ranks, self.context.replay
        with self.interventions.batch_of(found) as at_hand:
            return True in ranks.gather(at_hand and replay.batch_strange(extreme=extreme) is True)

    def look_at_buffers(self, reading: Reading, undo: BatchUndo) -> None:
        """Check before an update what its batch did to buffers that an earlier batch has made bad.

        Args:
            reading: The reading of the present update.
            undo: Has the buffers as they were before the batch.
        """
        if not self.plausibility.watches or self._found:
            return
        fault = self.plausibility.strange_buffers(undo.before(), self.context.state.healthy_steps)
        # A value that occurs in many batches in a row is usual for the data.
        if fault is not None and self.context.state.bad_in_a_row < self.context.thresholds.decision.blame.patience:
            self.runner.block(reading.optimizer_index)
            self._found.append(FoundFault(fault, reading, undo))

    def take_found(self) -> list[FoundFault]:
        """Return the faults found so far, oldest first, and forget them."""
        if not self._found:
            return []
        found, self._found = self._found, []
        state = self.context.state
        state.bad_in_a_row += any(one.fault.scope == "batch" for one in found)
        if {one.optimizer_index for one in self.readings} - {one.reading.optimizer_index for one in found}:
            state.good_beside = state.step
        return found

    def handle(self, found: FoundFault) -> bool:
        """Handle a fault; if it proves to be none, keep its reading as a healthy one.

        Returns:
            Whether the run has gone back to a snapshot.
        """
        if self.late.redo(found):
            self.non_finite -= 1
            return True
        handled = self.interventions.handle(found)
        if handled == "healthy":
            self._accept(found.reading)
        return handled == "restored"

    def _accept(self, reading: Reading) -> None:
        self.context.monitors.accept(reading)
        self.readings.append(reading)
