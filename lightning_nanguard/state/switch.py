"""Stores and restores whole states of the learner in turn, at little more than the cost of copying their tensors."""

from __future__ import annotations

from typing import Any, final

from lightning_nanguard.state.attributes import PLAIN
from lightning_nanguard.state.learner import Learner, StateKey
from lightning_nanguard.state.restore import is_weight, restore, restore_scaler
from lightning_nanguard.state.snapshot import Bound, Snapshot, capture, fits


@final
class StateSwitch:
    """Stores and restores states of the learner in turn, such as those of branches.

    :func:`~lightning_nanguard.state.snapshot.capture` and :func:`~lightning_nanguard.state.restore.restore` compare
    every tensor with its copy, which takes far longer than to copy a small tensor. A switch binds each snapshot that it
    stores to the tensors it was copied from. As long as the learner consists of the same tensors, it only copies them.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._held: list[Any] | None = None

    def changed(self) -> None:
        """Note that the learner may consist of other tensors than before, because a batch was run."""
        self._held = None

    def store(self, step: int, reuse: Snapshot | None = None) -> Snapshot:
        """Copy the learner.

        Args:
            step: Number of the last update.
            reuse: A snapshot that is no longer needed, whose memory is used again.
        """
        learner, held = self._learner, self._now()
        if reuse is not None and reuse.bound is not None and reuse.bound[0].holds(held):
            reuse.bound[0].store()
            reuse.step, reuse.scaler = step, None if learner.scaler is None else dict(learner.scaler.state_dict())
            return reuse
        leaves = list(learner.leaves())
        snapshot = capture(learner, step=step, global_step=0, reuse=reuse, leaves=leaves)
        if all(_can_be_bound(key, value, snapshot) for key, value in leaves):
            weights = [(key, value) for key, value in leaves if is_weight(key)]
            whole = Bound(held, leaves, snapshot.leaves)
            snapshot.bound = whole, Bound(learner.held_weights(), weights, snapshot.leaves)
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        """Restore the learner."""
        learner = self._learner
        if snapshot.bound is None or not snapshot.bound[0].holds(self._now()):
            restore(learner, snapshot)
            self.changed()
            return
        snapshot.bound[0].restore()
        learner.restored()
        if learner.scaler is not None and snapshot.scaler:
            restore_scaler(learner.scaler, snapshot.scaler)

    def restore_weights(self, snapshot: Snapshot) -> None:
        """Restore parameters and buffers, which are all that a loss depends on."""
        if snapshot.bound is None or not snapshot.bound[1].holds(self._learner.held_weights()):
            restore(self._learner, snapshot, keep=is_weight)
            self.changed()
            return
        snapshot.bound[1].restore()
        self._learner.restored()

    def _now(self) -> list[Any]:
        if self._held is None:
            self._held = self._learner.held()
        return self._held


def _can_be_bound(key: StateKey, value: Any, snapshot: Snapshot) -> bool:
    return fits(value, snapshot.leaves.get(key)) or isinstance(value, PLAIN)
