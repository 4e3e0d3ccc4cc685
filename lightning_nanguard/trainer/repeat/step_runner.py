"""Runs each micro-batch under automatic optimization, and runs it again if its loss or gradient is certainly bad."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any, final

import torch

from lightning_nanguard.guard.certification import vouch_for_start
from lightning_nanguard.state.attribute_memory import AttributeNumbers
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.state.step_start import StepClock, StepStart
from lightning_nanguard.trainer.private.closures import (
    MicroBatchRun,
    logging_for,
    result_of,
    uncounted,
    with_outputs_of,
)
from lightning_nanguard.trainer.private.training_step import as_in_training
from lightning_nanguard.trainer.repeat.accumulation_window import NOTHING_LEFT, WindowEntry
from lightning_nanguard.trainer.repeat.attempts import Attempts
from lightning_nanguard.trainer.repeat.kept_updates import KeptUpdates
from lightning_nanguard.trainer.repeat.numeric_errors import may_be_numeric
from lightning_nanguard.trainer.repeat.outcome import Outcome, fault_of, given, nan_loss
from lightning_nanguard.trainer.repeat.ranks_again import RanksAgain
from lightning_nanguard.trainer.repeat.updates_again import UpdatesAgain
from lightning_nanguard.trainer.repeat.window_again import WindowAgain
from lightning_nanguard.types import Fault, Reading

_logger = logging.getLogger("lightning_nanguard")


@final
class StepRunner:
    """Runs micro-batches in place of Lightning.

    A micro-batch is run again if its loss or gradient is certainly bad, or if ``training_step`` raises an error that
    NaN or Inf can cause. It runs from the same state, batch and random numbers. If the fault is gone, the step counts
    as healthy. In a window of accumulation, a micro-batch that stays bad is left out, and the update is made from the
    mean of the others. In all other cases the guard handles the fault.

    Args:
        runs: Runs a micro-batch once.
    """

    def __init__(self, runs: Attempts) -> None:
        context = runs.guard.context
        self._runs = runs
        self._check = runs.check
        self._records = runs.guard.steps.records
        self._undos = runs.guard.steps.undos
        self._alone = context.acts_alone
        self._window = runs.window
        self._numbers = AttributeNumbers(context.thresholds.batches.repeated)
        self._kept = KeptUpdates(runs)
        self._updates = UpdatesAgain(runs, self._kept)
        self._windows = WindowAgain(runs)
        self._ranks = RanksAgain(runs)

    def run(self, run: MicroBatchRun) -> Any:
        """Run a micro-batch, and run it again if needed; returns the result for Lightning."""
        if self._runs.repeats:
            return run.whole()
        random = self._runs.replay.batches.begin_step()
        try:
            if self._runs.guard.context.settings.observe:  # nothing is undone or repeated
                return run.whole()
            if run.zero_grad is not None:
                self._numbers.begin()
            start = self._runs.memory.open(run.batch, random)
            self._runs.replay.batches.begin_from(start.attributes)
            if run.zero_grad is not None:
                self._undos.also(start.carried_back)
                self._undos.also(self._numbers.undo)
                self._numbers.open(start.attributes)
            if self._alone and self._runs.replay.batches.nothing_left():
                return self._pass_over(run, start)
            return self._guarded(run, start) if self._runs.allowed and run.repeatable else run.whole()
        finally:
            self._runs.replay.batches.end_step()
            self._runs.memory.close()

    def _guarded(self, run: MicroBatchRun, start: StepStart) -> Any:
        micro = self._window.add(run, start)
        try:
            outcome = self._runs.attempt(micro, steps=self._window.completes)
            if outcome.good:
                return self._over(outcome.result)
            with self._runs.replay.batches.as_begun():
                return self._bad(micro, outcome)
        finally:
            if self._window.completes:
                self._window.close()

    def _bad(self, micro: WindowEntry, outcome: Outcome) -> Any:
        if self._runs.together:
            return self._ranks.run(outcome) if outcome.error is None else given(outcome)
        may_repeat = self._runs.may_repeat()
        self._runs.memory.close()
        if not may_repeat:
            return outcome.result if outcome.error is None else self._raised_once(micro, outcome)
        if len(self._window.micros) > 1 and not outcome.early:
            return self._over(self._windows.run(outcome))
        return self._micro_again(micro, outcome)

    def _raised_once(self, micro: WindowEntry, outcome: Outcome) -> Any:
        """A step that cannot be made again has raised an exception: skip it if the numbers of its batch caused it."""
        backward = not outcome.early
        if self._runs.memory.writes_weights or not self._runs.caused_by_numbers(micro, backward=backward):
            return given(outcome)
        after = micro.start.clock_now()
        micro.start.restore()
        self._keep()
        return self._pass_on(micro, outcome, after, counted=backward)

    # ---------------------------------------------------------------------------------------- one micro-batch again

    def _micro_again(self, micro: WindowEntry, first: Outcome) -> Any:
        """Run a bad micro-batch again. The gradients may hold those of earlier micro-batches, but not its own."""
        after = micro.start.clock_now()
        last, counted = first, False
        # The second try keeps counters and flags that the first run changed, because some faults depend on them.
        for keeps in (False, True) if after.counted and first.error is None else (False,):
            counted = counted or not last.early
            self._runs.rewind(micro, last)
            if keeps:
                after.restore_counters()
            with self._runs.repeating(counted=counted):
                last = self._runs.attempt(micro, steps=self._window.completes)
            if last.good:
                if keeps:
                    after.restore_counters()
                self._runs.call_missed_hooks(first)
                self._records.transient(fault_of(first), counters=after.names if keeps else ())
                return self._over(last.result)
            # A step that raises only when it is run again depends on something that its first run has used up.
            if last.error is not None and (first.error is None or not may_be_numeric(last.error, micro.run.batch)):
                self._runs.memory.repeatable = False
                _logger.debug("NaNGuard: a step cannot be made again: %r", last.error)
                break
        if after.counted:
            after.restore_counters()  # as after one run
        return self._stays_bad(micro, first, last, after, counted=counted or not last.early)

    def _stays_bad(self, micro: WindowEntry, first: Outcome, last: Outcome, after: StepClock, *, counted: bool) -> Any:
        """The fault came back: keep the good samples, leave out the micro-batch, or let the guard handle it."""
        kept = self._with_good_samples(micro, first, last, counted=counted)
        if micro.kept is not None and kept is not None:
            self._runs.call_missed_hooks(first)
            whole = self._nan_result() if first.result is None else first.result
            return self._window_over(with_outputs_of(kept.result, whole))
        if first.error is not None and not self._runs.caused_by_numbers(micro, backward=not first.early):
            raise first.error
        if kept is not None:
            last, counted = kept, counted or kept.fault is not None
        if self._may_go_back(fault_of(first)):
            again = self._from_snapshot(micro, first, last, counted=counted)
            if again.good:
                return self._over(again.result)
            last = Outcome(early=True)  # everything was restored to the start of the micro-batch
        alone = self._window.completes and len(self._window.left_out()) == len(self._window.micros) - 1
        if not self._runs.accumulating() and first.error is None and last.error is None and not last.early:
            self._keep()
            return last.result  # forward and backward have run; the guard handles the result
        self._runs.rewind(micro, last)
        if self._runs.accumulating() and not alone and self._check.state_is_finite():
            return self._leave_out(micro, first, after, counted=counted)
        self._keep()
        return self._pass_on(micro, first, after, counted=counted)

    def _with_good_samples(self, micro: WindowEntry, first: Outcome, last: Outcome, *, counted: bool) -> Outcome | None:
        """Run the good samples of a bad micro-batch; ``None`` if nothing was run or restored."""
        usable = self._runs.memory.repeatable and micro.kept is None
        keeper = self._runs.active_keeper() if usable else None
        if keeper is None:
            return None
        self._runs.rewind(micro, last)
        part = keeper.good_part(micro, fault_of(first))
        if part is None:
            return Outcome(early=True)
        with self._runs.repeating(counted=counted), logging_for(self._runs.trainer, micro.run.batch):
            # In a window, bad gradients may come from other micro-batches.
            outcome = self._runs.attempt(micro, steps=self._window.completes and len(self._window.micros) == 1)
        if keeper.settle(micro, outcome, part):
            return outcome
        self._runs.rewind(micro, outcome)
        return Outcome(fault=None if outcome.early else fault_of(outcome), early=True)

    def _may_go_back(self, fault: Fault) -> bool:
        vouch_for_start(self._runs.guard.context, self._check.number - 1)
        good = self._runs.guard.context.ring.last_certified
        if good is None or self._window.left_out() or not self._check.may_go_back(fault):
            return False
        last = self._check.number - 1
        if self._runs.replay.batch_finite() is False or self._updates.since(good, last, last + 1) is None:
            return False
        return not (self._updates.futile and self._check.state_is_finite())

    def _from_snapshot(self, micro: WindowEntry, first: Outcome, last: Outcome, *, counted: bool) -> Outcome:
        """The state may be at fault: repeat the updates since the snapshot, and then run this micro-batch."""
        snapshot = self._runs.guard.context.ring.certified[0]
        spoilt = self._check.spoilt_since(snapshot)
        earliest = self._window.micros[0].start
        self._runs.rewind(micro, last)
        gradients = self._runs.gradients_if_room()
        if gradients is None:
            return first
        self._undos.undo()
        before = self._updates.go(snapshot, self._check.number - 1, then=micro)
        self._runs.give_gradients(gradients)
        again = first
        if before is not None:
            self._undos.begin_again(earliest.carried_back)
            self._window.rewind(micro)
            with self._runs.repeating(counted=counted):
                again = self._runs.attempt(micro, steps=self._window.completes)
            if again.good:
                self._runs.call_missed_hooks(first)
                self._records.transient(fault_of(first), spoilt=spoilt, since=snapshot)
                self._updates.log_again()
                return again
            self._runs.rewind(micro, again)
            before()
            self._undos.begin_again(earliest.carried_back)
            self._runs.give_gradients(gradients)
            self._updates.futile = True
        self._window.rewind(micro)
        return again

    def redo_since(self, snapshot: Snapshot, bad: Reading | None) -> bool:
        """After a rollback outside of a batch: repeat the updates since the snapshot; return whether this succeeded.

        Args:
            snapshot: The snapshot that the rollback restored.
            bad: The reading of the bad update, if this update was made.
        """
        if self._runs.guard.swapped:
            return False  # weights are averages
        with as_in_training(self._runs.trainer):
            if self._updates.go(snapshot, self._runs.guard.updates, bad=bad) is None:
                return False
            self._updates.log_again()
        return True

    def _pass_on(self, micro: WindowEntry, first: Outcome, after: StepClock, *, counted: bool) -> Any:
        """Run a bad micro-batch with its backward pass. An exception is replaced by a loss of NaN."""
        self._check.raised(self._check.in_words(first.error))
        stands = self._nan_result() if first.error is not None or not self._runs.memory.repeatable else None
        with (
            self._runs.repeating(counted=counted, instead=stands),
            self._runs.passing(),
            torch.autograd.set_detect_anomaly(False) if stands is not None else nullcontext(),
        ):
            try:
                result = micro.run.whole()
            except Exception as error:
                # A hook of the module may check for NaN, as in the first run.
                if first.error is None or type(error) is not type(first.error):
                    raise
                result = stands
        if stands is not None:
            after.restore()  # else the next step would draw the same random numbers
        return result if first.result is None else first.result

    def _nan_result(self) -> Any:
        return result_of(self._runs.trainer, nan_loss(self._runs.module))

    def _pass_over(self, run: MicroBatchRun, start: StepStart) -> Any:
        """Skip the forward and backward pass of a batch whose samples are all known to be bad."""
        self._window.add(run, start).left_out = NOTHING_LEFT
        result = self._nan_result()
        if run.zero_grad is not None:
            run.zero_grad()
        try:
            if self._window.completes and len(self._window.left_out()) == len(self._window.micros):
                self._check.pass_over()
                if self._runs.guard.context.learner.scaler is not None:  # a GradScaler raises if it finds no gradients
                    for parameter in self._runs.module.parameters():
                        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
                return self._over(result)
            return self._window_over(result)
        finally:
            if self._window.completes:
                self._window.close()

    # ---------------------------------------------------------------------------------------- windows

    def _leave_out(self, micro: WindowEntry, first: Outcome, after: StepClock, *, counted: bool) -> Any:
        """Go on as if the micro-batch were not in its window. Everything was already restored to its start."""
        if micro.run.zero_grad is not None:
            with uncounted(self._runs.trainer, self._runs.is_guard) if counted else nullcontext():
                micro.run.zero_grad()
        after.restore()
        micro.left_out = fault_of(first)
        self._runs.replay.batches.leave_out(micro.run.batch)
        return self._window_over(self._nan_result() if first.result is None else first.result)

    def _window_over(self, result: Any) -> Any:
        """A micro-batch was left out or made smaller: before the update, check the gradients of the others."""
        if self._window.completes and len(self._window.micros) > 1:
            fault = self._runs.weighed_fault()
            if fault is not None and self._runs.may_repeat():
                result = self._windows.run(Outcome(result, fault))
        return self._over(result)

    def _over(self, result: Any) -> Any:
        """The micro-batch is over. If the update follows, keep it, and record the micro-batches that were left out."""
        if self._window.micros:
            self._window.micros[-1].loss = getattr(result, "loss", None)
        self._keep()
        if self._window.completes:
            for micro, fault in self._window.left_out():
                if fault is not NOTHING_LEFT:
                    with self._runs.replay.suspecting(micro.run.batch_idx):
                        self._records.left_out(fault, self._records.diagnosis(fault))
            for micro, (fault, finding) in self._window.kept():
                with self._runs.replay.suspecting(micro.run.batch_idx):
                    self._records.kept_good_samples(fault, finding)
        return result

    def _keep(self) -> None:
        """Keep the data of the next update, so that it can be repeated."""
        if self._window.completes:
            self._kept.keep()
