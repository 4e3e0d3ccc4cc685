"""A fault that waits for the end of its batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.types import Fault, Reading, Trial


@final
@dataclass(frozen=True, slots=True)
class ShownTrial:
    """A trial that is over.

    Attributes:
        trial: What it has shown.
        arm: The state of its arm, with the number of its updates.
    """

    trial: Trial
    arm: Snapshot


@final
@dataclass(frozen=True, slots=True)
class FoundFault:
    """A fault and where it was found.

    Attributes:
        fault: The fault.
        reading: The reading it was found in.
        undo: Undoes what its batch changed; ``None`` outside a batch.
        reached: Whether the bad update reached the weights.
        late: Whether the fault belongs to an earlier batch than the present one.
        ranks: Ranks that saw it, if not all of them did.
        unmade: Whether the present update has not been made yet, so that ``global_step`` does not count it.
        shown: The trial of the fault that has just ended; ``None`` without one.
        line_search: Whether it was found in a further evaluation of one step, with other weights than those of the run.
        tried: These weights; ``None`` if they are those of the run, or there was no room for a copy.
    """

    fault: Fault
    reading: Reading
    undo: BatchUndo | None = None
    reached: bool = False
    late: bool = False
    ranks: tuple[int, ...] = ()
    unmade: bool = False
    shown: ShownTrial | None = None
    line_search: bool = False
    tried: Snapshot | None = None

    @property
    def arm(self) -> Snapshot | None:
        """The arm of a trial from which the run is to continue; ``None`` without one."""
        return self.shown.arm if self.shown is not None and self.shown.trial.continues else None

    def not_again(self, restored: int) -> Reading | None:
        """The reading of the update that is left out after a rollback; ``None`` if no batch is at fault.

        Args:
            restored: Number of the last update that the restored state holds.
        """
        if self.reached or self.fault.scope == "batch":
            return self.reading
        # A gradient that made the state bad is the gradient of an earlier update.
        spoils = self.fault.place == "gradient" and self.fault.value is not None
        return self.reading._replace(step=restored + 1, grad_norm=self.fault.value) if spoils else None
