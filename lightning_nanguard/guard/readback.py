"""A reading that has arrived from the device: at once, or late, or from all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, final

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
