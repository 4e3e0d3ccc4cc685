"""Reads each update's loss and gradient norm before its step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

from lightning_nanguard.guard.meter import Meter
from lightning_nanguard.guard.readback import Arrived
from lightning_nanguard.guard.state import GuardState
from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.types import Fault, Reading


@final
class StepReadback:
    """Reads each update before it is made; a :class:`~lightning_nanguard.guard.readback.Readback`.

    Args:
        meter: Measures loss and gradient norm.
        state: The guard's counts.
    """

    def __init__(self, meter: Meter, state: GuardState) -> None:
        self._meter = meter
        self._state = state
        self.at_hand: Reading | None = None

    def due(self, optimizer_index: int) -> Iterator[Arrived]:
        """Return nothing: all earlier readings have been judged."""
        return iter(())

    def submit(self, optimizer_index: int, undo: BatchUndo) -> Arrived | None:
        """Measure and read this update."""
        self.at_hand = self._meter.measure_now(self._state.step, optimizer_index)
        if self.at_hand is None:
            return None
        return Arrived(self.at_hand, undo, line_search=self._meter.is_line_search(optimizer_index))

    def arrived(self, optimizer_index: int) -> Iterator[Arrived]:
        """Return nothing: all earlier readings have been judged."""
        return iter(())

    def flush(self) -> Iterator[Arrived]:
        """Return nothing: no reading is on its way."""
        return iter(())

    def hold(self, fault: Fault) -> bool:
        """Keep no fault: it can be judged at once."""
        return False

    def end_batch(self) -> bool:
        """Note the end of a batch: no reading arrives later."""
        return False

    def clear(self) -> None:
        """Do nothing: no reading is on its way."""
