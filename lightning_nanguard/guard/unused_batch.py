"""Undoes the effect on buffers of a batch from which no update is made."""

from __future__ import annotations

from typing import final

from torch import Tensor

from lightning_nanguard.guard.batch_undos import BatchUndos
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.step_records import StepRecords
from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.state.learner import StateKey
from lightning_nanguard.types import Fault


def is_bad_elsewhere(context: GuardContext, undo: BatchUndo) -> bool:
    """Whether the state is bad even without what a batch wrote to buffers, so that the batch is not the only source.

    Args:
        context: Objects and settings that the parts of the guard share.
        undo: Has the buffers as they were before the batch.
    """
    before: dict[StateKey, Tensor] = {("buffer", name): buffer for name, buffer in undo.before().items()}
    others = ((key, leaf) for key, leaf in context.learner.leaves() if key not in before)
    return context.finite.corrupt(before.items()) is not None or context.finite.corrupt(others) is not None


@final
class UnusedBatch:
    """Restores buffers that a forward pass made NaN or Inf, if no update is made from its batch.

    A user who returns no loss for a bad batch, or does not step, does not undo its effect on batch norm.

    Args:
        context: Objects and settings that the parts of the guard share.
        undos: Undo the present batch.
        records: Records it.
    """

    def __init__(self, context: GuardContext, undos: BatchUndos, records: StepRecords) -> None:
        self._context = context
        self._undos = undos
        self._records = records

    def undo_spoilt_buffers(self) -> None:
        """Undo the newest forward pass if it made a buffer NaN or Inf, and nothing else did."""
        if not self._context.acts_alone:
            return
        finite, undo = self._context.finite, self._undos.newest
        before = undo.before()
        now = self._context.learner.leaves()
        spoilt = finite.corrupt((key, leaf) for key, leaf in now if key[0] == "buffer" and key[1] in before)
        if spoilt is None or is_bad_elsewhere(self._context, undo):
            return
        message = f"the forward pass made {spoilt} NaN or Inf, and no update was made from its batch"
        fault = Fault("non_finite_statistics", "batch", spoilt, None, message)
        finding = self._records.diagnosis(fault)
        undo.undo()
        self._records.undone(fault, finding)
