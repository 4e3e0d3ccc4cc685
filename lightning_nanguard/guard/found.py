"""A fault that waits for the end of its batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.types import Fault, Reading


@final
@dataclass(frozen=True, slots=True)
class FoundFault:
    """A fault and where it was found.

    Attributes:
        fault: The fault.
        reading: The reading it was found in.
        undo: Undoes what its batch changed; ``None`` outside a batch.
        reached: Whether the bad update reached the weights.
        late: Whether the present batch is another one.
        ranks: Ranks that saw it, where not all did.
        unmade: Whether the present update has not been made yet, so that ``global_step`` does not count it.
    """

    fault: Fault
    reading: Reading
    undo: BatchUndo | None = None
    reached: bool = False
    late: bool = False
    ranks: tuple[int, ...] = ()
    unmade: bool = False
