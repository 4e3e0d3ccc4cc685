"""Makes the updates since the snapshot again after a fault that was read late and happened by chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lightning_nanguard.act.skip import StepSkipper
from lightning_nanguard.guard.caution import Caution
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.found import FoundFault
from lightning_nanguard.guard.snapshot_manager import SnapshotManager
from lightning_nanguard.guard.step_parts import StepParts
from lightning_nanguard.state.snapshot import Snapshot


@final
@dataclass(eq=False)
class LateRedo:
    """Repeats an update that was not finite, and all updates that were made before its reading arrived.

    Args:
        context: Objects and settings that the parts of the guard share.
        steps: Decide whether a rollback is allowed, and record.
        skipper: Skips updates.
        snapshots: Is told about the rollback.
        caution: Is told about the rollback.
    """

    context: GuardContext
    steps: StepParts
    skipper: StepSkipper
    snapshots: SnapshotManager
    caution: Caution

    def redo(self, found: FoundFault) -> bool:
        """Make the updates since the last good state again; return whether the fault was gone.

        If it was not, nothing has changed.
        """
        snapshot, redo = self._snapshot(found), self.context.replay.redo
        if snapshot is None or redo is None:
            return False
        skipped = set(self.skipper.skipped)
        self.skipper.skipped.clear()  # these updates must be made
        if not redo(snapshot, found.reading):
            self.skipper.skipped |= skipped
            return False
        self.snapshots.count_from(self.context.state.step)
        self.caution.update_undone(found, buffers=False)
        self.steps.records.transient(found.fault, since=snapshot, late=found.reading.step)
        return True

    def _snapshot(self, found: FoundFault) -> Snapshot | None:
        """The snapshot to begin at; ``None`` if the updates cannot be made again."""
        fault, reading, good = found.fault, found.reading, self.context.ring.last_certified
        if not (found.late and fault.certain and fault.scope == "batch") or reading.finite or reading.scaler_skips:
            return None
        if good is None or good.step >= reading.step or not self.steps.check.may_go_back(fault):
            return None
        return good
