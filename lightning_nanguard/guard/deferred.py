"""Readings that are read late: they wait here, each with what its batch may have touched."""

from __future__ import annotations

from collections import deque
from typing import final

from lightning_nanguard.act.skip import skips_on_device
from lightning_nanguard.measure.readings import PendingReading
from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.state.learner import Learner

MAX_DELAY = 2
"""Updates after which a reading is waited for in deferred readback."""


@final
class DeferredReadings:
    """Readings on their way, oldest first.

    Args:
        learner: What is trained.
        by_loss: Whether the device may judge by the loss as well as by the gradient: among ranks losses differ.
        observe: Whether nothing may be held back.
    """

    def __init__(self, learner: Learner, *, by_loss: bool, observe: bool) -> None:
        self._learner = learner
        self._by_loss = by_loss
        self._observe = observe
        self._flagged = False
        self._queue: deque[tuple[PendingReading, BatchUndo]] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def defer(self, pending: PendingReading, scope: BatchUndo) -> None:
        """Send a reading on its way; where the optimizer can, the device itself holds a bad update back."""
        optimizer = self._learner.optimizers[pending.optimizer_index]
        if self._learner.scaler is None and skips_on_device(optimizer) and not self._observe:
            # Fused optimizers leave their state alone where this flag is set: decided without the host.
            bad = pending.is_bad(by_loss=self._by_loss)
            optimizer.found_inf, optimizer.grad_scale = bad, None  # type: ignore[attr-defined]
            self._flagged = True
            scope.undo_where(bad)  # now: the next batch builds on the buffers of this one
            pending.held_back = True
        pending.send()
        self._queue.append((pending, scope))

    def drop_flags(self) -> None:
        """Take from the optimizers what :meth:`defer` has set."""
        if not self._flagged:
            return
        self._flagged = False
        for optimizer in self._learner.optimizers:
            for name in ("found_inf", "grad_scale"):
                vars(optimizer).pop(name, None)

    def arrived(self, step: int) -> tuple[PendingReading, BatchUndo] | None:
        """The oldest one, if it has arrived or must be waited for in update ``step``."""
        if not self._queue:
            return None
        pending, _ = self._queue[0]
        if pending.step > step - MAX_DELAY and not pending.arrived():
            return None
        return self._queue.popleft()

    def next(self) -> tuple[PendingReading, BatchUndo]:
        """The oldest one."""
        return self._queue.popleft()

    def clear(self) -> None:
        """Forget them all."""
        self._queue.clear()
