"""Undoes the effect of a batch in which no optimizer steps: on gradients, and on buffers."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from lightning_nanguard.guard.batch_undos import BatchUndos
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.meter import Meter
from lightning_nanguard.guard.step_records import StepRecords
from lightning_nanguard.measure.finite import non_finite_indices
from lightning_nanguard.state.learner import StateKey
from lightning_nanguard.types import Fault, Reading


@final
class UnusedBatch:
    """Undoes the effect of a bad batch in which no optimizer steps.

    Under manual optimization the user's code decides which batches make an update together. Only the batch in which the
    optimizer steps is measured, and a bad loss of an earlier one spoils the gradients of all. So such a batch is left
    out of the update. This counts only once gradients were seen to last from one batch to the next: code may also skip
    a step and empty the gradients later.

    A user who returns no loss for a bad batch, or does not step, does not undo its effect on batch norm. So buffers
    that its forward pass made NaN or Inf are restored.

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
        if not bad or self._is_bad_elsewhere():
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

    def undo_spoilt_buffers(self) -> None:
        """Undo the newest forward pass if it made a buffer NaN or Inf, and nothing else did."""
        if not self._context.acts_alone:
            return
        finite, undo = self._context.finite, self._undos.newest
        before = undo.before()
        now = self._context.learner.leaves()
        spoilt = finite.corrupt((key, leaf) for key, leaf in now if key[0] == "buffer" and key[1] in before)
        if spoilt is None or self._is_bad_elsewhere():
            return
        message = f"the forward pass made {spoilt} NaN or Inf, and no update was made from its batch"
        fault = Fault("non_finite_statistics", "batch", spoilt, None, message)
        finding = self._records.diagnosis(fault)
        undo.undo()
        self._records.undone(fault, finding)

    def _is_bad_elsewhere(self) -> bool:
        """Whether the state is bad even without what the batch wrote to buffers, so that it is not the only source."""
        context = self._context
        before: dict[StateKey, Tensor] = {("buffer", name): one for name, one in self._undos.newest.before().items()}
        others = ((key, leaf) for key, leaf in context.learner.leaves() if key not in before)
        return context.finite.corrupt(before.items()) is not None or context.finite.corrupt(others) is not None
