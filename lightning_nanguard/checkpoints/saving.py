"""Writes the last good state in place of a checkpoint that holds NaN or Inf."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, final

from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from lightning_nanguard.checkpoints.mending import mended
from lightning_nanguard.checkpoints.poison import KnownWeights, poisoned
from lightning_nanguard.distributed.ranks import Ranks, first_over_ranks
from lightning_nanguard.measure.tensors import local
from lightning_nanguard.state.finite import FiniteCheck, own_buffers
from lightning_nanguard.state.learner import Learner, StateKey
from lightning_nanguard.state.restore import restore
from lightning_nanguard.state.ring import Ring
from lightning_nanguard.state.snapshot import Snapshot, capture_whole
from lightning_nanguard.types import Fault


@final
class SaveGuard:
    """Checks every checkpoint before it is written, and replaces bad state in it by the last good state.

    Args:
        learner: The learner of the run.
        ring: Stores the snapshots.
        finite: Finds tensors that are not finite.
        note: Records a fault and what was done about it.
        observe: Whether checkpoints are only checked, and not changed.
        ranks: All processes.
    """

    def __init__(
        self,
        learner: Learner,
        ring: Ring,
        finite: FiniteCheck,
        note: Callable[..., None],
        *,
        observe: bool,
        ranks: Ranks,
    ) -> None:
        self._learner = learner
        self._ring = ring
        self._finite = finite
        self._note = note
        self._observe = observe
        self._ranks = ranks
        # The last good state, joined from all ranks while a checkpoint is written.
        self._whole: Snapshot | None = None
        # The present state, while the last good state is in its place.
        self._set_aside: Snapshot | None = None

    def begin(self) -> None:
        """Start to write a checkpoint."""
        self._whole = None

    def prepare(self) -> None:
        """With several ranks, make the last good state available if the present state is bad.

        If only one rank writes, all ranks join the snapshot for it. Sharded parameters and moments are saved by all
        ranks. In this case the good state replaces the present state until :meth:`end`.
        """
        good = self._ring.newest()
        if good is None or (self._ranks.world == 1 and not self._ranks.sharded):
            return
        bad, _ = first_over_ranks(self._ranks, self._finite.corrupt(self._learner.leaves()))
        if bad is None:
            return
        if not self._ranks.sharded:
            self._whole = self._ranks.join_snapshot(good)
            return
        if not self._observe:
            message = f"{bad} is not finite while a checkpoint is about to be written"
            self._note(Fault("poisoned_checkpoint", "state", bad, None, message), "rewrite")
            self._set_aside = capture_whole(self._learner)
            self._put(good)

    def end(self) -> None:
        """After the checkpoint has been written, restore the present state if :meth:`prepare` has replaced it."""
        aside, self._set_aside = self._set_aside, None
        if aside is not None:
            self._put(aside)

    def mend(self, checkpoint: dict[str, Any], path: str, *, recorded: bool) -> dict[str, Any]:
        """The checkpoint to write: the given one or, if it is poisoned, a copy with the last good state.

        Args:
            checkpoint: The checkpoint that is about to be written.
            path: Its path, for the record.
            recorded: Whether a fault of its state has just been recorded.
        """
        if self._ranks.rank > 0 and not self._ranks.sharded:
            return checkpoint  # only rank 0 writes
        weights = {key[1]: leaf for key, leaf in self._learner.weights()}
        bad = poisoned(checkpoint, KnownWeights(weights, self._finite.allowed, own_buffers(self._learner.module)))
        if self._ranks.sharded:
            # Each rank has checked only its own shards. If one rank mended its checkpoint, it would not fit the others.
            name, _ = first_over_ranks(self._ranks, bad[0] if bad else None)
            if name is not None and not recorded:
                message = f"{name} of a checkpoint about to be written to {path} is not finite"
                self._note(Fault("poisoned_checkpoint", "state", name, None, message))
            return checkpoint
        if not bad or (self._observe and recorded):
            return checkpoint
        good = self._good_leaves()
        listed = f"{bad[0]} and {len(bad) - 1} more" if len(bad) > 1 else bad[0]
        message = f"{listed} of a checkpoint about to be written to {path} is not finite"
        self._note(Fault("poisoned_checkpoint", "state", bad[0], None, message), *(("rewrite",) if good else ()))
        return checkpoint if self._observe or good is None else mended(checkpoint, self._learner, good)

    def _put(self, snapshot: Snapshot) -> None:
        # Keep the version counters: the backward pass of the present batch needs the tensors unchanged.
        with ExitStack() as versions:
            for _, leaf in self._learner.weights():
                versions.enter_context(_unsafe_preserve_version_counter(local(leaf)))
            # All but the GradScaler, because saving must not lower the loss scale.
            restore(self._learner, snapshot, keep=lambda key: key != ("scaler",))

    def _good_leaves(self) -> Mapping[StateKey, Any] | None:
        live = dict(self._learner.leaves())
        if self._finite.corrupt(live.items()) is None:
            return live
        kept = [*self._ring.certified[:1], *([] if self._ring.pending is None else [self._ring.pending])]
        kept = [one for one in kept if one.intact()]
        if self._whole is not None:
            kept.insert(0, self._whole)
        kept = [one for one in kept if not one.shared()]
        return next((one.leaves for one in kept if self._finite.corrupt(one.leaves.items()) is None), None)
