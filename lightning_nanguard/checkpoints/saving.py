"""No poisoned file: what is written in the place of a checkpoint that holds a value gone bad."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, final

from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from lightning_nanguard.checkpoints.inspection import mended, poisoned
from lightning_nanguard.distributed.ranks import Ranks, first
from lightning_nanguard.guard.investigator import Investigator
from lightning_nanguard.measure.tensors import local
from lightning_nanguard.state.learner import Learner, StateKey
from lightning_nanguard.state.restore import restore
from lightning_nanguard.state.ring import Ring
from lightning_nanguard.state.snapshot import Snapshot, capture
from lightning_nanguard.types import Fault


@final
class Saving:
    """Looks at checkpoints before they are written, and puts the last good state in their place where it must.

    Args:
        learner: What is trained.
        ring: The snapshots.
        investigator: Knows what is not finite by design.
        note: Records what was done.
        observe: Whether what is written is left as it is.
        ranks: All processes.
    """

    def __init__(
        self,
        learner: Learner,
        ring: Ring,
        investigator: Investigator,
        note: Callable[..., None],
        *,
        observe: bool,
        ranks: Ranks,
    ) -> None:
        self._learner = learner
        self._ring = ring
        self._investigator = investigator
        self._note = note
        self._observe = observe
        self._ranks = ranks
        self._put_together: Snapshot | None = None
        self._aside: Snapshot | None = None

    def begin(self) -> None:
        """A checkpoint is about to be written."""
        self._put_together = None

    def put_together(self) -> None:
        """Have the last good state at hand where the one of now is bad.

        Whole, since one rank alone will write it. Sharded parameters and moments are collected by all ranks: there it
        takes the place of the state of now until :meth:`end`.
        """
        good = self._ring.certified[0] if self._ring.certified else self._ring.pending
        if good is None or (self._ranks.world == 1 and not self._ranks.sharded):
            return
        bad, _ = first(self._ranks, self._investigator.corrupt(self._learner.leaves()))
        if bad is None:
            return
        if not self._ranks.sharded:
            self._put_together = self._ranks.whole(good)
            return
        if not self._observe:
            message = f"{bad} is not finite while a checkpoint is about to be written"
            self._note(Fault("poisoned_checkpoint", "state", bad, None, message), "rewrite")
            self._aside = capture(self._learner, step=0, global_step=0)
            self._put(good)

    def end(self) -> None:
        """It has been written."""
        aside, self._aside = self._aside, None
        if aside is not None:
            self._put(aside)

    def _put(self, snapshot: Snapshot) -> None:
        # A graph under way finds its tensors as they were by the time it is used, and their versions must say so.
        with ExitStack() as unnoticed:
            for _, leaf in self._learner.weights():
                unnoticed.enter_context(_unsafe_preserve_version_counter(local(leaf)))
            restore(self._learner, snapshot, keep=_state)

    def mend(self, checkpoint: dict[str, Any], path: str, *, told: bool) -> dict[str, Any]:
        """What to write in the place of a checkpoint.

        Args:
            checkpoint: What is about to be written.
            path: Where to, for the record.
            told: Whether what is wrong with the state has just been recorded.
        """
        if self._ranks.rank > 0 and not self._ranks.sharded:
            return checkpoint  # rank 0 writes
        weights = {path[1]: leaf for path, leaf in self._learner.weights()}
        bad = poisoned(checkpoint, weights, self._investigator.allowed)
        if self._ranks.sharded:
            # Each rank has looked at its own shards, and what one of them would put in fits no other's.
            name, _ = first(self._ranks, bad[0] if bad else None)
            if name is not None and not told:
                message = f"{name} of a checkpoint about to be written to {path} is not finite"
                self._note(Fault("poisoned_checkpoint", "state", name, None, message))
            return checkpoint
        if not bad or (self._observe and told):
            return checkpoint
        good = self._good()
        listed = f"{bad[0]} and {len(bad) - 1} more" if len(bad) > 1 else bad[0]
        message = f"{listed} of a checkpoint about to be written to {path} is not finite"
        self._note(Fault("poisoned_checkpoint", "state", bad[0], None, message), *(("rewrite",) if good else ()))
        return checkpoint if self._observe or good is None else mended(checkpoint, self._learner, good)

    def _good(self) -> dict[StateKey, Any] | None:
        live = dict(self._learner.leaves())
        if self._investigator.corrupt(live.items()) is None:
            return live
        kept = [*self._ring.certified[:1], *([] if self._ring.pending is None else [self._ring.pending])]
        if self._put_together is not None:
            kept.insert(0, self._put_together)
        kept = [one for one in kept if not one.shared()]
        for one in kept:
            one.wait()
        return next((one.leaves for one in kept if self._investigator.corrupt(one.leaves.items()) is None), None)


def _state(path: StateKey) -> bool:
    # All that has a path; the GradScaler has none, and its scale is not to fall on account of a save.
    return True
