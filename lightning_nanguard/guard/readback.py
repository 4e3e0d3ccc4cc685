"""How readings arrive: what the guard asks of each way to read loss and gradient norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, final

from lightning_nanguard.guard.found import FoundFault
from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.types import Fault, Reading

MAX_DELAY = 2
"""Updates after which a late reading is waited for."""


@final
class Arrived(NamedTuple):
    """A reading that has arrived at the host.

    Attributes:
        reading: The reading.
        undo: Undoes what its batch changed.
        reached: Whether its update was made, if it was a bad one.
        late: Whether the batch at hand is another one.
        line_search: Whether it is of a further evaluation of one step, as LBFGS makes them.
        ranks: Gives the ranks that stand out, where not all do.
        outside: A fault found outside of any update, which all ranks have just heard of, and the ranks that saw it.
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
    """The reading of the update at hand, where it was read in this process before its step."""

    def open_batches(self) -> int:
        """Batches whose changes must still be undone when they are judged, the one at hand among them."""

    def due(self, optimizer_index: int) -> Iterator[Arrived]:
        """Readings of earlier updates that have arrived, or must be waited for, before this optimizer steps."""

    def submit(self, optimizer_index: int, undo: BatchUndo) -> Arrived | None:
        """Measure the update that this optimizer is about to make; gives its reading where it can be judged now."""

    def arrived(self, optimizer_index: int) -> Iterator[Arrived]:
        """Readings that have arrived meanwhile."""

    def flush(self) -> Iterator[Arrived]:
        """Every reading that is still on its way, waited for."""

    def hold(self, fault: Fault) -> bool:
        """Take a fault found outside a step, to be judged with the next update; whether it was taken."""

    def update_undone(self, found: FoundFault, *, statistics: bool) -> None:
        """A restore has undone an update.

        Args:
            found: The fault it was restored for.
            statistics: Whether a batch has spoiled running statistics.
        """

    def end_batch(self) -> bool:
        """A batch is over; whether readings of it may still arrive."""

    def clear(self) -> None:
        """Forget everything that is on its way."""
