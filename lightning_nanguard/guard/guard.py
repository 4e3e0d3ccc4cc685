"""The guard of one training run, for any loop: the order of a step.

:mod:`lightning_nanguard.guard.loop` says what a loop calls and when.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_nanguard.act.skip import unscales_itself
from lightning_nanguard.guard.certification import vouch_for_start
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.found import FoundFault
from lightning_nanguard.guard.parts import GuardParts
from lightning_nanguard.guard.step_parts import StepParts
from lightning_nanguard.state.restore import mend_averages
from lightning_nanguard.types import Fault, Reading

_logger = logging.getLogger("lightning_nanguard")


@final
class Guard:
    """Guards one training run. A loop calls it in each step, and it detects, decides, acts and records."""

    def __init__(self, parts: GuardParts) -> None:
        self._parts = parts
        self._context = parts.context
        self._state = parts.context.state
        self._monitors = parts.context.monitors
        self._readback = parts.readback
        self._snapshots = parts.snapshots
        self._undos = parts.steps.undos
        self._judge = parts.judge
        # Whether weights and averages are swapped, as WeightAveraging does in validation.
        self.swapped = False
        # State of the present batch.
        self._open = False
        self._running = False
        self._begun = False
        self._updated = False
        self._loss_seen = False

    # ---------------------------------------------------------------------------------------- the order of a step

    def start(self) -> None:
        """Check the state before the first update, and take the first snapshot."""
        context = self._context
        context.finite.begin(context.learner)
        self._parts.bad_start.look()
        if not context.settings.observe:
            # The same hook scales the rate and removes the gradients of skipped updates.
            context.rate.attach(self._parts.skipper.remove_gradients, self._parts.skipper.return_gradients)
        for optimizer in context.learner.optimizers:
            context.rate.valid.look(optimizer)  # a hook may make them invalid before the first update
        self._parts.certification.start()

    def open_batch(self) -> None:
        """Copy what the next batch may change. A window of accumulation counts as one batch."""
        if not self._begun:
            self._begun = True
            self._parts.certification.start_again_if_changed()
        self._running = True
        self._loss_seen = False
        within, self._open = self._open, True
        self._undos.open(within=within)
        self._parts.steps.unused.open()
        if not within:
            self._parts.skipper.open()

    def see_loss(self, loss: Tensor) -> None:
        """Keep a reference to the loss of one backward pass."""
        self._loss_seen = True
        self._parts.meter.see_loss(loss)
        self._parts.steps.unused.see_loss()

    def before_step(self, optimizer_index: int) -> None:
        """Measure the update and detect faults; skip the update if it is bad.

        Args:
            optimizer_index: Index of the optimizer about to step.
        """
        self._snapshots.placement.settle()
        self._judge.judge_late(self._readback.due(optimizer_index), optimizer_index)
        self._parts.certification.start_again_if_lazy()
        new = self._state.count(optimizer_index, several=optimizer_index in self._context.learner.quasi_newton)
        self._judge.add(self._parts.hyperparameters.look(optimizer_index))
        if new:
            self._parts.outliers.see_rates(optimizer_index)
        self._state.note_rate(self._context.rate.first())
        if self._context.settings.act_on == "evidence" and new:
            self._state.note_groups(self._context.learner.optimizers[optimizer_index].param_groups)
        self._updated = True
        if self._judge.weights_are_bad() or self._state.passed_over:
            # The weights are already bad, or the batch is known to be bad: skip the update without measuring it.
            self._parts.meter.drop_losses()
            self._parts.skipper.skip(optimizer_index)
            return
        arrived = self._readback.submit(optimizer_index, self._undos.present)
        if self._parts.meter.has_new_size and self._parts.certification.start_again_if_resized():
            self._parts.meter.forget_sizes()
        if arrived is not None:
            self._judge.judge(arrived, optimizer_index)
        self._judge.judge_late(self._readback.arrived(), optimizer_index)
        reading = self._readback.at_hand
        if reading is not None:
            self._judge.look_at_buffers(reading, self._undos.present)
        if self._context.clipper.value is not None:
            self._clip(optimizer_index, None if reading is None else reading.grad_norm)

    def close_batch(self) -> bool:
        """Handle the faults of this batch. Without faults, certify and take snapshots.

        Returns:
            Whether no fault was found, and the batch is not known to be bad.

        Raises:
            TrainingDivergedError: If the run cannot be saved, or its first weights were not finite.
        """
        self._running = False
        alone = self._parts.loop.micro_batches() == 1
        left_out = alone and not self._updated and self._parts.steps.unused.leave_out()
        unused = not left_out and alone and not self._updated and not self._context.settings.deferred
        if unused or not self._loss_seen:
            self._parts.steps.unused.undo_spoilt_buffers()
        if not self._updated:
            if alone or not self._context.learner.optimizers:
                self._open = False
                self._parts.meter.drop_losses()
            return not left_out
        if self._readback.end_batch():
            self._parts.recorder.mark()
        found, passed_over = self._judge.take_found(), self._state.passed_over
        rolled_back = False
        if not found:
            self._parts.skipper.undo()  # of an update that was skipped without a fault, as of a quarantined batch
        try:
            if found:
                self._parts.hyperparameters.refresh()
                self._snapshots.placement.settle()  # handling the fault may write to the learner
                if not found[0].reached:
                    vouch_for_start(self._context, found[0].reading.step - 1)
                self._parts.bad_start.stop_if_lost(found[0])
            for one in found:
                rolled_back = self._judge.handle(one)
                if rolled_back:
                    break  # the other faults belonged to the state before the rollback
            if self._judge.readings and not found:
                rolled_back = self._healthy()
            shown = None if rolled_back else self._parts.beside.after(self._judge.readings)
            if shown is not None:
                self._judge.handle(shown)
        finally:
            self._open = self._updated = False
            self._judge.readings = []
            self._state.end_batch()
            self._parts.meter.end_batch()
            self._parts.skipper.return_gradients()  # needed if the optimizer's step raised
            self._parts.skipper.skipped.clear()
        return not found and not passed_over

    def end_epoch(self) -> bool:
        """End the epoch: forget a batch that was opened but not run; return whether there was one."""
        if not self._running or self._updated:
            return False
        self._open = self._running = False
        self._parts.meter.drop_losses()
        return True

    def report(self, fault: Fault) -> None:
        """Handle a fault that was found outside a step, such as in validation.

        The guard acts on it at once. With several ranks, this rank may be the only one that saw it. Then all ranks act
        on it together with the next update.
        """
        if not self._readback.hold(fault):
            self._report(fault, ())

    def _report(self, fault: Fault, ranks: tuple[int, ...]) -> None:
        vouch_for_start(self._context, self._state.step)
        self._judge.handle(FoundFault(fault, Reading(self._state.step, 0, None, None), ranks=ranks))

    def flush(self) -> None:
        """Read the readings that have not arrived yet, and act on them."""
        while True:
            self._judge.judge_late(self._readback.flush(), None)
            found = self._judge.take_found()
            for one in found:
                self._judge.handle(one)
            if not found:
                return

    def finish(self) -> None:
        """Check the final state after the last update, and read the readings that have not arrived yet.

        With several ranks it only reads, because with uneven data some ranks may never call it.
        """
        if self._context.many:
            self.flush()
        elif not self.updates and (bad := self._context.corrupt()[0]) is not None:
            _logger.warning(
                "NaNGuard: %s is no longer finite at the end of the run. No update was guarded, so nothing is undone.",
                bad,
            )
        elif self.check():
            self.look(anyway=True)  # the last check may be older than the last change of a weight or an average
        self._judge.suspicions.at_end()
        self._parts.outliers.finish()
        self._parts.beside.close()  # a trial that has not ended is part of the summary

    def excuses(self, optimizer: Optimizer, *, numeric: bool) -> bool:
        """Whether an exception in an optimizer's step can be ignored, because the update is skipped anyway.

        Args:
            optimizer: The optimizer.
            numeric: Whether NaN or Inf can be the cause of the exception.
        """
        context = self._context  # a GradScaler must finish its step
        if context.learner.scaler is not None or not self._parts.skipper.excuses(optimizer, numeric=numeric):
            return False
        context.rate.withdraw()
        return True

    def close(self) -> None:
        """Release the optimizers and all memory."""
        self._readback.end_batch()
        self._parts.beside.close()
        self._context.rate.detach()
        self._snapshots.close()
        self._context.ranks.close()

    def leave(self) -> None:
        """Stop waiting for other ranks, because this process has raised an exception."""
        if self._context.many:
            self._readback.clear()
            self._context.ranks.leave()

    # ---------------------------------------------------------------------------------------- saving

    def before_save(self) -> None:
        """Check the state before it is saved.

        The state is not changed during a batch, because autograd needs the tensors unchanged. It is not changed while
        averages replace the weights either. In both cases only :meth:`mend` makes the checkpoint good.
        """
        self._parts.saving.begin()
        if not self._open and not self.swapped:
            self.check()
        else:
            self._parts.saving.prepare()

    def after_save(self) -> None:
        """Finish after a checkpoint has been written."""
        self._parts.saving.end()

    def mend(self, checkpoint: dict[str, Any], path: str, *, checked: bool = False) -> dict[str, Any]:
        """The checkpoint to write: the given one or, if it is poisoned, a copy with the last good state.

        The run itself does not change.

        Args:
            checkpoint: The checkpoint that is about to be written.
            path: Its path, for the record.
            checked: Whether :meth:`before_save` has just been called.
        """
        return self._parts.saving.mend(checkpoint, path, recorded=checked and not self._open and not self.swapped)

    def want_snapshot(self) -> None:
        """Take a snapshot at the end of this batch, or of the next one that is healthy."""
        self._snapshots.want()

    def note(self, fault: Fault, *words: str) -> None:
        """Record what was done outside the order of a step."""
        self._parts.recorder.note(fault, *words)

    def look(self, *, anyway: bool = False) -> None:
        """Check the state as if it were a snapshot, and go back if it is not finite or far out of range.

        Args:
            anyway: Whether to check even if the state was checked shortly before.
        """
        state, snapshots = self._state, self._snapshots
        if self._open or self._context.settings.observe or not (anyway or snapshots.look_due(state.step)):
            return
        snapshots.placement.settle()  # handling a fault may write to the learner
        self.flush()
        fault = snapshots.look()
        if fault is not None:
            self._report(fault, ())

    def check(self) -> bool:
        """Check the present state, and go back to the last good one if it is bad; return whether it was good."""
        self._snapshots.placement.settle()  # the caller may write to it next
        self.flush()
        self._snapshots.look_at_room()
        context = self._context
        bad, ranks = context.corrupt()
        if bad is None:
            return True
        fault = Fault("corrupted_state", "state", bad, None, f"{bad} is no longer finite")
        if self._open and not context.settings.observe:
            # An unfinished batch may have made the statistics of batch norm bad.
            self._undos.undo()
            if context.corrupt()[0] is None:
                self.note(fault, "undo")
                return False
        self._judge.readings = []
        self._report(fault, ranks)
        if not context.settings.observe:
            mend_averages(context.learner, context.finite.corrupt)
        return False

    # ---------------------------------------------------------------------------------------- clip and certify

    def _clip(self, optimizer_index: int, norm: float | None) -> None:
        context, meter = self._context, self._parts.meter
        optimizer = context.learner.optimizers[optimizer_index]
        scale = meter.loss_scale() if unscales_itself(optimizer) else None
        if context.ranks.sharded:
            # A healthy update waits for no other collective. This one runs only while sharded gradients are clipped.
            norm = math.hypot(*context.ranks.gather(meter.gradient_norm(optimizer_index)))
        elif scale is not None:
            norm = None  # the norm that was read belongs to unscaled gradients
        if optimizer_index not in self._parts.skipper.skipped and not context.settings.observe:
            known = None if norm is None else torch.tensor(norm)
            context.clipper.clip(context.learner.gradients(optimizer_index), scale, known)

    def _healthy(self) -> bool:
        """Certify and take snapshots after a healthy update; return whether the run was rolled back."""
        state = self._state
        self._parts.bad_start.forget()
        state.bad_in_a_row, state.good_beside = 0, None
        if all(reading.scaler_skips for reading in self._judge.readings):
            return False  # the GradScaler skipped the update, so it says nothing about the state
        state.healthy_steps += 1
        if state.healthy_since_restore is not None:
            state.healthy_since_restore += 1
        self._parts.outliers.after(self._judge.readings)
        objection = self._parts.certification.judge(self._judge.readings)
        rolled_back = objection is not None and self._judge.handle(objection)
        self._parts.certification.capture_if_due()
        self._parts.recovery.give_back(trial_runs=self._parts.beside.trials.running)
        return rolled_back

    # ---------------------------------------------------------------------------------------- what others read

    @property
    def context(self) -> GuardContext:
        """Objects and settings that the parts of the guard share."""
        return self._context

    @property
    def steps(self) -> StepParts:
        """What a loop needs to make a step again."""
        return self._parts.steps

    @property
    def non_finite(self) -> int:
        """Number of updates so far whose loss or gradient was not finite, without overflows that a GradScaler skips."""
        return self._judge.non_finite

    @property
    def in_window(self) -> bool:
        """Whether a window of accumulation is open."""
        return self._open

    @property
    def updates(self) -> int:
        """Attempted updates so far."""
        return self._state.step

    def say_where(self, on_disk: Callable[[], str]) -> None:
        """Set the function that names, in lines, what lies on disk for the error that ends a run."""
        self._parts.recorder.on_disk = on_disk

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to continue as if it had not stopped, in plain containers."""
        parts = self._parts
        return {
            "non_finite": self._judge.non_finite,
            **self._state.state_dict(),
            **parts.caution.state_dict(),
            **parts.recovery.state_dict(),
            **parts.investigator.state_dict(),
            "trials": parts.beside.trials.state_dict(),
            "recorder": parts.recorder.state_dict(),
            "plausibility": parts.plausibility.state_dict(),
            "snapshots": self._snapshots.state_dict(),
            "streams": self._monitors.state_dict(),
            "samples": self._context.samples.state_dict(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; call it before :meth:`start`."""
        parts = self._parts
        self._judge.non_finite = int(saved["non_finite"])
        self._state.load_state_dict(saved)
        self._context.finite.squares_overflow = self._state.large_gradients_usual
        self._snapshots.count_from(self._state.step)
        parts.caution.load_state_dict(saved)
        parts.recovery.load_state_dict(saved)
        parts.investigator.load_state_dict(saved)
        parts.beside.trials.load_state_dict(saved.get("trials", {}))
        parts.recorder.load_state_dict(saved.get("recorder", {}))
        parts.plausibility.load_state_dict(saved.get("plausibility", {}))
        self._snapshots.load_state_dict(saved.get("snapshots"))
        self._monitors.load_state_dict(saved["streams"])
        self._context.samples.load_state_dict(saved.get("samples", {}))
