"""Leaves a bad batch out of the gradients that later batches add to."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from lightning_nanguard.guard.batch_undos import BatchUndos
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.meter import Meter
from lightning_nanguard.guard.step_records import StepRecords
from lightning_nanguard.guard.unused_batch import is_bad_elsewhere
from lightning_nanguard.measure.finite import non_finite_indices
from lightning_nanguard.types import Reading


@final
class Accumulation:
    """Leaves a batch with a bad loss out of an update that is made in a later batch.

    Under manual optimization the user's code decides which batches make an update together. Only the batch in which the
    optimizer steps is measured, and a bad loss of an earlier one spoils the gradients of all. This counts only once
    gradients were seen to last from one batch to the next: code may also skip a step and empty the gradients later.

    Args:
        context: Objects and settings that the parts of the guard share.
        meter: Has the losses of the batch.
        undos: Undo the present batch.
        records: Records it.
    """

    def __init__(self, context: GuardContext, meter: Meter, undos: BatchUndos, records: StepRecords) -> None:
        self._context = context
        self._meter = meter
        self._undos = undos
        self._records = records
        # A loop that runs batches again handles its windows itself. Late readings must not wait for a loss.
        self._possible = context.acts_alone and not (context.settings.deferred or context.replay.comparable())
        # Whether gradients have once lasted from a batch without a step to the next, and whether this is to be checked.
        self._lasts = self._asks = False
        # The gradients before the first bad loss of this batch; ``None`` without one.
        self._before: list[tuple[Tensor, Tensor | None]] | None = None

    def open(self) -> None:
        """A batch begins."""
        self._before = None

    def see_loss(self) -> None:
        """Copy the gradients if the backward pass that begins has a bad loss. This waits for no device."""
        if self._asks and not self._lasts:
            self._lasts = any(
                bool(one.any()) for index in self._indices() for one in self._context.learner.gradients(index)
            )
        self._asks = False
        if self._possible and self._before is None and self._meter.bad_loss(wait=False) is not None:
            parameters = {id(p): p for index in self._indices() for p in self._context.learner.stepped(index)}
            self._before = [(p, None if p.grad is None else p.grad.detach().clone()) for p in parameters.values()]

    def leave_out(self) -> bool:
        """Undo the present batch, in which no optimizer stepped, if its loss has made gradients bad.

        Returns:
            Whether it was undone.
        """
        context = self._context
        self._asks = self._possible
        if not (self._possible and self._lasts) or context.learner.scaler is not None:
            return False
        loss = self._meter.bad_loss()
        bad = [] if loss is None else [i for i in self._indices() if non_finite_indices(context.learner.gradients(i))]
        if not bad or is_bad_elsewhere(context, self._undos.newest):
            return False
        reading = Reading(context.state.next_step, bad[0], loss, None, finite=False, loss_finite=False)
        fault = context.monitors.check(reading)
        if fault is None or fault.scope != "batch":
            return False
        finding = self._records.diagnosis(fault)
        self._undos.newest.undo()
        self._put_back(bad)
        self._records.left_out(fault, finding)
        return True

    def _indices(self) -> range:
        return range(len(self._context.learner.optimizers))

    def _put_back(self, bad: list[int]) -> None:
        if self._before is None:  # the loss was not read before its backward pass, so the earlier batches are lost, too
            for index in bad:
                for gradient in self._context.learner.gradients(index):
                    gradient.detach().zero_()
            return
        for parameter, before in self._before:
            if parameter.grad is None or before is None or before.is_sparse:
                parameter.grad = None if parameter.grad is None else before
            else:
                with torch.no_grad():
                    parameter.grad.copy_(before)
