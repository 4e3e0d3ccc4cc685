"""Repeats a step on all ranks together if its gradient is bad on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, final

import torch

from lightning_nanguard.distributed.ranks import most_confident_over_ranks
from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.state.step_start import StepClock
from lightning_nanguard.trainer.private.closures import logging_for
from lightning_nanguard.trainer.repeat.accumulation_window import WindowEntry
from lightning_nanguard.trainer.repeat.attempts import Attempts
from lightning_nanguard.trainer.repeat.outcome import Outcome, fault_of, no_loss
from lightning_nanguard.types import Fault


@final
class RanksAgain:
    """Repeats steps together with the other ranks, all of which found the same gradient to be bad.

    Every rank makes the same number of passes with synchronised gradients, and calls the same collectives. If the
    module's step calls some itself, a micro-batch that is bad on one rank is left out on all of them.

    Args:
        runs: Runs micro-batches.
    """

    def __init__(self, runs: Attempts) -> None:
        self._runs = runs
        self._check = runs.check
        self._records = runs.guard.steps.records
        self._undos = runs.guard.steps.undos
        self._ranks = runs.guard.context.ranks
        self._window = runs.window

    def run(self, first: Outcome) -> Any:
        """Repeat the update; all ranks know that its gradient is bad.

        Args:
            first: The outcome of its last micro-batch.

        Returns:
            The result for Lightning.
        """
        raised = next((one.raised for one in self._window.micros if one.raised is not None), None)
        if not all(self._ranks.gather(self._runs.may_repeat())):
            if raised is not None:
                raise raised
            return first.result
        self._runs.memory.close()
        after = self._window.micros[-1].start.clock_now()
        if len(self._window.micros) > 1:
            return self._window_again(first, after)
        return self._step_again(first, after)

    def _step_again(self, first: Outcome, after: StepClock) -> Any:
        (micro,) = self._window.micros
        last = first
        for keeps in (False, True) if any(self._ranks.gather(after.counted)) else (False,):
            self._runs.rewind(micro, last)
            if keeps:
                after.restore_counters()
            with self._runs.repeating(counted=True):
                last = self._attempt(micro, steps=True)
            if last.good:
                if keeps:
                    after.restore_counters()
                self._records.transient(fault_of(first), ranks=self._check.seen_by)
                return last.result
        self._tell_errors([] if last.caught is None else [micro])
        return last.result  # backward has run on all ranks; the guard handles the result

    def _tell_errors(self, again: Sequence[WindowEntry]) -> None:
        """Tell all ranks about exceptions that came back. Raise one if NaN or Inf did not cause it."""
        raised = [(micro, micro.raised) for micro in again if micro.raised is not None]
        users = next((one for micro, one in raised if not self._runs.caused_by_numbers(micro, backward=False)), None)
        told = self._ranks.gather(self._check.in_words(raised[0][1] if raised else None))
        if users is not None:
            raise users
        self._check.raised(next((one for one in told if one is not None), None))

    # ---------------------------------------------------------------------------------------- windows

    def _window_again(self, first: Outcome, after: StepClock) -> Any:
        """Find the bad micro-batches of each rank, and make the update from the others."""
        window = self._window
        trace = self._runs.undo_if_room()
        if not all(self._ranks.gather(trace is not None)) or trace is None:
            return first.result
        self._undos.undo()
        if not self._check.state_is_finite():
            return first.result  # no micro-batch is at fault; the guard restores the state
        self._check.drop_losses()
        with self._runs.repeating(counted=True):
            with self._runs.trainer.strategy.block_backward_sync():  # type: ignore[attr-defined]
                raised = [micro for micro in window.micros if self._raises(micro, trace)]
            self._tell_errors(raised)
            self._leave_out_beside()
            good = [micro for micro in window.micros if micro.is_used]
            total, every = sum(self._ranks.gather(len(good))), len(window.micros) * self._ranks.world
            self._check.drop_losses()
            self._undos.undo()
            if not total:
                after.restore()
                self._spoil(first)
                return first.result
            self._runs.give_gradients()
            window.shares = every, total
            outcome = self._make(good)
        if not window.micros[-1].is_used:
            after.restore()
        window.micros[-1].loss = getattr(outcome.result, "loss", None)
        if outcome.good and total == every:
            self._records.transient(fault_of(first), ranks=self._check.seen_by)
        elif outcome.good:
            self._record_left_out()
        return outcome.result if first.result is None or window.micros[-1].is_used else first.result

    def _leave_out_beside(self) -> None:
        """If the step communicates, leave out a micro-batch on all ranks, or the others would wait for it."""
        if not any(self._ranks.gather(self._runs.collectives)):
            return
        micros = self._window.micros
        unused = self._ranks.gather([index for index, micro in enumerate(micros) if not micro.is_used])
        for index in {index for of_rank in unused for index in of_rank if index < len(micros)}:
            micros[index].beside = micros[index].left_out is None

    def _raises(self, micro: WindowEntry, trace: BatchUndo) -> bool:
        """Run a micro-batch alone, and leave it out if it is bad; return whether it raised."""
        self._runs.give_gradients()
        clean = all(one.left_out is None for one in self._window.micros)
        micro.start.restore(carried=clean)
        attributes = self._runs.memory.attributes_now()
        trace.open()
        with logging_for(self._runs.trainer, micro.run.batch):
            outcome = self._attempt(micro, steps=False)
        loss = getattr(outcome.result, "closure_loss", None)
        fault = self._check.fault_of_loss(loss) or self._check.fault_of_gradients()
        if fault is None and outcome.caught is None:
            return False
        trace.undo()
        attributes.restore(plain=False)
        micro.left_out = fault_of(Outcome(error=outcome.caught)) if fault is None or outcome.caught else fault
        self._runs.replay.batches.leave_out(micro.run.batch)
        return outcome.caught is not None

    def _make(self, good: Sequence[WindowEntry]) -> Outcome:
        """Run the good micro-batches. Every rank runs the last one with synchronised gradients."""
        for index, micro in enumerate(good):
            clean = index == 0 or all(one.is_used for one in self._window.micros)
            micro.start.restore(carried=clean)
            with logging_for(self._runs.trainer, micro.run.batch):
                if micro is good[-1]:
                    return self._attempt(micro, steps=True)
                with self._runs.trainer.strategy.block_backward_sync():  # type: ignore[attr-defined]
                    self._attempt(micro, steps=False)
        # This rank has no good micro-batch. The others wait for its part of the sum, so it adds a loss of 0.
        micro = self._window.micros[-1]
        micro.start.restore()
        with self._runs.in_place_of_step(partial(no_loss, self._runs.module)):
            return self._attempt(micro, steps=True)

    def _attempt(self, micro: WindowEntry, *, steps: bool) -> Outcome:
        outcome = self._runs.attempt(micro, steps=steps)
        if outcome.error is not None:
            raise outcome.error  # this rank's part of the sum is lost
        return outcome

    def _spoil(self, first: Outcome) -> None:
        """No micro-batch is good: make a bad gradient on every rank, so that the guard skips the update."""
        loss = getattr(first.result, "closure_loss", None)
        if loss is not None:
            self._runs.guard.see_loss(loss)
        parameters = self._runs.module.parameters()
        self._runs.give_gradients(torch.full_like(p, torch.nan) if p.requires_grad else None for p in parameters)

    def _record_left_out(self) -> None:
        mine = self._window.left_out()
        told = [[micro.run.batch_idx, one.kind, one.scope, one.place, one.message] for micro, one in mine]
        for rank, those in enumerate(self._ranks.gather(told)):
            for batch_idx, kind, scope, place, message in those:
                fault = Fault(kind, scope, place, None, message)
                with self._runs.replay.suspecting(batch_idx):
                    # Every rank diagnoses its micro-batch of this index, because the diagnosis calls collectives.
                    finding = most_confident_over_ranks(self._ranks, self._records.diagnosis(fault))
                    self._records.left_out(fault, finding, (rank,))
