"""Runs all micro-batches of a window of accumulation again, and leaves out those that are bad."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import repeat
from typing import Any, final

from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.trainer.private.closures import logging_for, with_outputs_of
from lightning_nanguard.trainer.repeat.accumulation_window import WindowEntry
from lightning_nanguard.trainer.repeat.attempts import Attempts
from lightning_nanguard.trainer.repeat.outcome import Outcome, fault_of, given


@final
class WindowAgain:
    """Repeats a window with a bad gradient, to find out which of its micro-batches is at fault.

    Args:
        runs: Runs micro-batches.
    """

    def __init__(self, runs: Attempts) -> None:
        self._runs = runs
        self._check = runs.check
        self._undos = runs.guard.steps.undos
        self._window = runs.window

    def run(self, first: Outcome) -> Any:
        """Run all micro-batches of the window again, one by one, and leave out those that are bad.

        Args:
            first: The outcome of the newest one.

        Returns:
            The result for Lightning.
        """
        window, result, fault = self._window, None, None
        trace = self._runs.undo_if_room()
        if trace is None:
            return given(first)
        known, kept = len(window.left_out()), len(window.kept())
        self._check.drop_losses()
        self._undos.undo()
        with self._runs.repeating(counted=True):
            for micro in window.micros:
                last = window.completes and micro is window.micros[-1]
                result = self._one(micro, known, trace, last=last)
        if first.error is not None and window.micros[-1].left_out is not None:
            micro = window.micros[-1]
            if not self._runs.caused_by_numbers(micro, backward=not first.early):
                raise first.error
        if window.completes:
            fault = self._runs.weighed_fault()
        if len(window.left_out()) == known and len(window.kept()) == kept and fault is None:
            self._runs.call_missed_hooks(first)
            self._runs.guard.steps.records.transient(fault_of(first))
        if result is not None and first.result is not None and window.micros[-1].kept is not None:
            return with_outputs_of(result, first.result)
        return first.result if result is None else result

    def _one(self, micro: WindowEntry, known: int, trace: BatchUndo, *, last: bool) -> Any:
        if micro.left_out is not None:
            if micro.run.zero_grad is not None:
                micro.run.zero_grad()
            return None
        before = repeat(None) if micro.run.zero_grad is not None else self._runs.gradients()
        # After a micro-batch was left out, later ones must not get the attributes that it had changed.
        carried = len(self._window.left_out()) == known
        micro.start.restore(carried=carried)
        attributes = self._runs.memory.attributes_now()
        trace.open()

        def undo(outcome: Outcome) -> None:
            if not outcome.early and outcome.error is None:
                self._check.drop_last_loss()
            self._runs.give_gradients(before)
            trace.undo()
            attributes.restore(plain=False)

        only = last and len(self._window.left_out()) == len(self._window.micros) - 1
        outcome = self._attempt(micro, passing=only)
        keeper = self._runs.active_keeper()
        if outcome.good or (only and outcome.error is None and keeper is None):
            return outcome.result
        undo(outcome)
        part = None if keeper is None else keeper.good_part(micro, fault_of(outcome))
        if keeper is not None and part is not None:
            micro.start.restore(carried=carried)
            again = self._attempt(micro)
            if keeper.settle(micro, again, part):
                return again.result
            undo(again)
        if only and outcome.error is None:
            micro.start.restore(carried=carried)
            return self._attempt(micro, passing=True).result
        micro.left_out = fault_of(outcome)
        return outcome.result

    def _attempt(self, micro: WindowEntry, *, passing: bool = False) -> Outcome:
        with logging_for(self._runs.trainer, micro.run.batch), self._runs.passing() if passing else nullcontext():
            outcome = self._runs.attempt(micro, steps=False)
        if outcome.good:
            outcome.fault = self._check.fault_of_gradients()
        return outcome
