"""Actions that remedies may take on a run: restore the learner, cut the rate, clip, try rates."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

from lightning_nanguard.act.skip import StepSkipper
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.found import FoundFault
from lightning_nanguard.guard.rank_readback import Readback
from lightning_nanguard.guard.recovery import Recovery
from lightning_nanguard.guard.rehearsal import Rehearsal
from lightning_nanguard.guard.snapshot_manager import SnapshotManager
from lightning_nanguard.state.learner import StateKey, describe
from lightning_nanguard.state.restore import average_of, bad_averages, mend_averages, mend_statistics, restore
from lightning_nanguard.state.snapshot import Snapshot

_logger = logging.getLogger("lightning_nanguard")


@final
@dataclass(eq=False)
class RemedyActions:
    """Does what remedies ask for in one intervention; a :class:`~lightning_nanguard.act.base.RunControl`.

    Args:
        context: Objects and settings that the parts of the guard share.
        recovery: Cuts the rate and clips.
        rehearsal: Tries rates.
        skipper: Skips updates.
        snapshots: Is told about a restore.
        readback: Is told about a restore.
        found: The fault.
        known_until: Last update whose reading is kept even if a state from before it is restored.

    Attributes:
        restored: The snapshot that was restored; ``None`` if none was.
        unrestored: A tensor that is still not finite after the restore, in words; ``None`` if there is none.
    """

    context: GuardContext
    recovery: Recovery
    rehearsal: Rehearsal
    skipper: StepSkipper
    snapshots: SnapshotManager
    readback: Readback
    found: FoundFault
    known_until: int = 0
    restored: Snapshot | None = field(default=None, init=False)
    unrestored: str | None = field(default=None, init=False)

    def skip(self) -> None:
        """Undo what the batch of the fault changed."""
        found = self.found
        if found.undo is not None:
            # The device has already undone an update that it skipped, and later batches have changed the buffers since.
            found.undo.undo(buffers=not found.late or found.reached)
            if not found.late:
                self._restore_buffers(found.undo.written())
            self.skipper.undo()

    def _restore_buffers(self, names: Collection[str]) -> None:
        """Restore those buffers that hold NaN from the newest snapshot. The present batch has changed them first."""
        context, snapshot = self.context, self.context.ring.newest()
        if not names or snapshot is None:
            return
        leaves = [(key, leaf) for key, leaf in context.learner.weights() if key[0] == "buffer" and key[1] in names]
        spoilt = {one[0] for one in leaves if context.finite.spoilt_buffer([one], snapshot.leaves)}
        if spoilt:
            restore(context.learner, snapshot, keep=lambda key: key in spoilt)

    def restore(self, depth: int) -> None:
        """Go back to a certified snapshot, or to the start of the fit if nothing was certified yet."""
        context, ring = self.context, self.context.ring
        if ring.certified:
            ring.drop_pending()
            snapshot = context.ranks.join_snapshot(ring.discard_newer(depth))
        else:
            pending = ring.newest()
            if pending is None:
                self.unrestored, _ = context.corrupt()
                return
            snapshot = pending
        self.restored = snapshot
        left = restore(context.learner, snapshot)
        if self.found.arm is not None:
            left = restore(context.learner, self.found.arm)  # keep what the arm has learned since
            self.snapshots.continue_from(self.found.arm)
        self._look_at_restored(left)
        context.state.healthy_since_restore, context.state.redone = 0, False
        self._forget(snapshot)
        for optimizer in context.learner.optimizers:
            # If batches cannot be run again, a captured CUDA graph may write to the memory of the gradients.
            optimizer.zero_grad(set_to_none=context.replay.comparable())

    def restore_averages(self) -> None:
        """Restore from the newest snapshot what no update is made from, if it is bad.

        These are copies of the weights, parameters that no optimizer trains, and bad numbers of running statistics.
        Copies that the snapshot does not have are set to the weights.
        """
        context, certified = self.context, self.context.ring.last_certified
        learner, corrupt = context.learner, context.finite.corrupt
        place = self.found.fault.place
        snapshot = None if certified is None else context.ranks.join_snapshot(certified)
        if snapshot is not None:
            untrained = learner.untrained()
            bad = bad_averages(learner.leaves(), corrupt, place, untrained)
            restore(learner, snapshot, keep=lambda key: average_of(key, untrained) in bad)
            mend_statistics(learner, snapshot)
        mend_averages(learner, corrupt)
        self.snapshots.mend_pending(place)

    def restore_scale(self) -> None:
        """Restore the scale of the GradScaler from the newest snapshot. No update has been made since it went bad."""
        snapshot = self.context.ring.newest()
        if snapshot is not None:
            restore(self.context.learner, snapshot, keep=lambda key: key == ("scaler",))
        self.readback.clear()  # what is not read yet has the bad scale, too

    def redone(self, snapshot: Snapshot) -> None:
        """Note that all updates since a snapshot were made again."""
        self.context.ring.drop_pending()  # its state is that of the updates before
        self.restored, self.context.state.redone = snapshot, True
        self._forget(snapshot)

    def _look_at_restored(self, left: Sequence[StateKey]) -> None:
        context = self.context
        if context.corrupt()[0] is not None:
            mend_averages(context.learner, context.finite.corrupt)  # no snapshot has an average that began later
        self.unrestored, _ = context.corrupt()
        if self.unrestored is not None:
            # No snapshot helps, so none is tried again.
            self.restored = None
            context.ring.clear()
        elif left and not context.ranks.rank:
            names = ", ".join(map(describe, left))
            _logger.warning("NaNGuard: the rollback did not restore %s, because the shape has changed.", names)

    def _forget(self, snapshot: Snapshot) -> None:
        # Forget everything that was read about states after this one.
        self.snapshots.restored(self.context.state.step)
        self.readback.clear()
        # An arm has learned already. So the loss of the untrained model is still the first one of the run.
        continues = self.found.arm is not None
        self.context.monitors.rewind(max(snapshot.step, self.known_until), keep_first=continues)

    def scale(self, factor: float, min_lr: float, *, limit: bool = False, tried: bool = False) -> None:
        """Multiply the learning rate. With ``limit``, set the product as the highest rate allowed instead."""
        self.recovery.scale(factor, min_lr, limit=limit, tried=tried)

    def clip(self, value: float, algorithm: Literal["norm", "value"]) -> None:
        """Clip gradients from now on; ``inf`` ends clipping."""
        self.recovery.clip(value, algorithm)

    def drop_moments(self) -> None:
        """Empty the optimizers' state."""
        for optimizer in self.context.learner.optimizers:
            optimizer.state.clear()

    def rehearse(self, factor: float, updates: int) -> float | None:
        """Try a rate from the state that was just restored."""
        if self.restored is None:
            return None
        self.skipper.skipped.clear()  # rehearsed updates must be made
        loss = self.rehearsal.loss_after(self.restored, factor, updates)
        return None if loss is None else loss / self.context.monitors.loss_unit()

    def rate_factor_of_restored(self) -> float:
        """The rate at which the restored state was taken, divided by the present one; 1 if one of them is not known.

        It is 0.1 if that state was taken at a rate of 0.001 and the rate is 0.01 now.
        """
        restored, now = self.restored, self.context.rate.first()
        return restored.rate / now if restored is not None and restored.rate and now else 1.0
