"""Reads loss and gradient norm of the updates of one process: before an update is made, or up to two updates later."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import final

from lightning_nanguard.act.skip import skips_on_device
from lightning_nanguard.guard.caution import Caution
from lightning_nanguard.guard.meter import Meter
from lightning_nanguard.guard.readback import MAX_DELAY, Arrived
from lightning_nanguard.guard.state import GuardState
from lightning_nanguard.measure.readings import PendingReading
from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.types import Fault, Reading


@final
class DeferredReadings:
    """Readings that have not arrived yet, oldest first. Each is stored with an object that undoes its batch.

    Args:
        learner: The learner of the run.
        state: Knows whether non-finite losses are usual in this run.
        by_loss: Whether the device may use the loss besides the gradient. Not with several ranks, whose losses differ.
        observe: Whether the device must not skip updates.
    """

    def __init__(self, learner: Learner, state: GuardState, *, by_loss: bool, observe: bool) -> None:
        self._learner = learner
        self._state = state
        self._by_loss = by_loss
        self._observe = observe
        self._flagged = False
        self._queue: deque[tuple[PendingReading, BatchUndo, bool]] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def defer(self, pending: PendingReading, undo: BatchUndo, *, line_search: bool) -> None:
        """Send a reading to the host. If the optimizer supports it, the device itself skips a bad update.

        Args:
            pending: The reading.
            undo: Undoes what its batch changed.
            line_search: Whether it comes from a further evaluation within one step.
        """
        optimizer = self._learner.optimizers[pending.optimizer_index]
        if self._learner.scaler is None and skips_on_device(optimizer) and not self._observe:
            # Fused optimizers change nothing if this flag is set. The device decides, so the host does not wait.
            bad = pending.is_bad(by_loss=self._by_loss and not self._state.bad_losses_usual)
            optimizer.found_inf, optimizer.grad_scale = bad, None  # type: ignore[attr-defined]
            self._flagged = True
            undo.undo_where(bad)  # now, because the next batch changes the same buffers
            pending.held_back = True
        pending.send(self._learner.device.read_later)
        self._queue.append((pending, undo, line_search))

    def drop_flags(self) -> None:
        """Remove the flags that :meth:`defer` has set on the optimizers."""
        if not self._flagged:
            return
        self._flagged = False
        for optimizer in self._learner.optimizers:
            for name in ("found_inf", "grad_scale"):
                vars(optimizer).pop(name, None)

    def arrived(self, step: int) -> tuple[PendingReading, BatchUndo, bool] | None:
        """The oldest reading, as it was deferred, if it has arrived or must be waited for in update ``step``."""
        if not self._queue:
            return None
        pending, *_ = self._queue[0]
        if pending.step > step - MAX_DELAY and not pending.arrived():
            return None
        return self._queue.popleft()

    def next(self) -> tuple[PendingReading, BatchUndo, bool]:
        """Remove the oldest reading and return it, as it was deferred."""
        return self._queue.popleft()

    def clear(self) -> None:
        """Forget all readings."""
        self._queue.clear()


@final
@dataclass(eq=False)
class LocalReadback:
    """Reads each update of one process before it is made or, if that is allowed, up to two updates later.

    Args:
        meter: Measures loss and gradient norm.
        state: The guard's counts.
        readings: The readings that have not arrived yet.
        caution: Decides which updates are read before they are made.

    Attributes:
        at_hand: The reading of the present update, if it was read before the optimizer's step, else ``None``.
    """

    meter: Meter
    state: GuardState
    readings: DeferredReadings
    caution: Caution
    _late: bool = field(default=False, init=False)
    at_hand: Reading | None = field(default=None, init=False)

    def due(self, optimizer_index: int) -> Iterator[Arrived]:
        """Readings of earlier updates that have arrived; all of them if the next one must be read before it is made."""
        self._late = self.caution.may_be_late(optimizer_index)
        return self._arrived_by(self.state.step + (0 if self._late else MAX_DELAY))

    def submit(self, optimizer_index: int, undo: BatchUndo) -> Arrived | None:
        """Measure the update that this optimizer is about to make; return its reading if it is read before that."""
        step, self.at_hand = self.state.step, None
        if self._late:
            pending = self.meter.measure_later(step, optimizer_index)
            if pending is not None:
                self.readings.defer(pending, undo, line_search=self.meter.is_line_search(optimizer_index))
            return None
        self.at_hand = self.meter.measure_now(step, optimizer_index)
        if self.at_hand is None:
            return None
        return Arrived(self.at_hand, undo, line_search=self.meter.is_line_search(optimizer_index))

    def arrived(self) -> Iterator[Arrived]:
        """Readings of earlier updates that have arrived by now."""
        return self._arrived_by(self.state.step)

    def _arrived_by(self, step: int) -> Iterator[Arrived]:
        while (late := self.readings.arrived(step)) is not None:
            yield self._read(*late)

    def _read(self, pending: PendingReading, undo: BatchUndo, line_search: bool) -> Arrived:
        reading = pending.read()
        # The device skips an update that is not finite, and a GradScaler skips one whose gradient is not finite. A
        # finite loss spike has reached the weights.
        by_device = pending.held_back and not reading.finite
        by_scaler = pending.loss_scale is not None and not reading.gradient_finite
        reached = not (by_device or by_scaler)
        return Arrived(reading, undo, reached=reached, late=True, line_search=line_search)

    def flush(self) -> Iterator[Arrived]:
        """Wait for all readings that have not arrived yet, and return them."""
        while self.readings:
            yield self._read(*self.readings.next())

    def hold(self, fault: Fault) -> bool:
        """Keep no fault: it can be judged at once."""
        return False

    def end_batch(self) -> bool:
        """Remove the flags from the optimizers; return whether readings are still on their way."""
        self.readings.drop_flags()
        return len(self.readings) > 0

    def clear(self) -> None:
        """Forget all readings that have not arrived yet."""
        self.readings.clear()
