"""The interface of the ways to read loss and gradient norm from the device (at once, deferred, among ranks)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, final

from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.types import Fault, Reading

MAX_DELAY = 2
"""Number of updates after which the guard waits for a late reading."""


@final
class Arrived(NamedTuple):
    """A reading that has arrived at the host.

    Attributes:
        reading: The reading.
        undo: Undoes what its batch changed.
        reached: True if the update was made before its reading arrived, so that a bad one is in the weights. False if
            the reading came in time, or the device held the update back.
        late: True if the reading arrived after its update, so that the present batch is a later one.
        line_search: True if it comes from a further evaluation within one step, as in the line search of LBFGS.
        ranks: Returns the ranks whose values stand out; empty if none or all do.
        outside: A fault found outside of an update that all ranks have now been told of, and the ranks that saw it.
    """

    reading: Reading
    undo: BatchUndo
    reached: bool = False
    late: bool = False
    line_search: bool = False
    ranks: Callable[[], tuple[int, ...]] = tuple
    outside: tuple[Fault, tuple[int, ...]] | None = None


class Readback(Protocol):
    """One way in which readings arrive."""

    at_hand: Reading | None
    """The reading of the present update, if this process read it before the optimizer's step, else ``None``."""

    def due(self, optimizer_index: int) -> Iterator[Arrived]:
        """Readings of earlier updates that have arrived, or must be waited for, before this optimizer steps."""

    def submit(self, optimizer_index: int, undo: BatchUndo) -> Arrived | None:
        """Measure the update that this optimizer is about to make; return its reading if it can be judged now."""

    def arrived(self, optimizer_index: int) -> Iterator[Arrived]:
        """Readings of earlier updates that have arrived by now."""

    def flush(self) -> Iterator[Arrived]:
        """Wait for all readings still on their way, and return them."""

    def hold(self, fault: Fault) -> bool:
        """Keep a fault found outside a step until the next update is judged; return whether it was kept."""

    def end_batch(self) -> bool:
        """Note the end of a batch; return whether readings of it may still arrive."""

    def clear(self) -> None:
        """Forget everything that is on its way."""
