"""Where snapshots lie, and how they get there while the run goes on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from lightning_nanguard.state.device import DeviceMemory, SideStreamCopy, cuda_device
from lightning_nanguard.state.learner import Learner, StateKey
from lightning_nanguard.state.ring import Ring
from lightning_nanguard.state.snapshot import Snapshot, capture, tensor_bytes
from lightning_nanguard.thresholds.snapshots import PlacementThresholds

_logger = logging.getLogger("lightning_nanguard")
_DEFAULTS = PlacementThresholds()


@final
class SnapshotPlacement:
    """Copies the learner to where snapshots lie: beside the weights, or in host memory.

    Args:
        learner: What is copied.
        ring: Where snapshots go; its memory is used again.
        device: Where snapshots lie; ``None`` beside the originals.
        choose: Whether host memory is chosen where a CUDA device has no room for snapshots. Among several processes it
            never is: they would choose differently.
        alone: Whether this is the only process. Several keep the same snapshots: none drops one for lack of memory.
        thresholds: What counts as room.
    """

    def __init__(
        self,
        learner: Learner,
        ring: Ring,
        device: torch.device | None = None,
        *,
        choose: bool = False,
        alone: bool = True,
        thresholds: PlacementThresholds = _DEFAULTS,
    ) -> None:
        self._learner = learner
        self._ring = ring
        self._device = device
        self._choose = choose and alone and device is None
        self._alone = alone
        self._limits = thresholds
        self._side_copy = SideStreamCopy()
        self._overlap = True
        self.unchanged: AbstractSet[StateKey] = frozenset()
        """State keys of tensors that did not change between the last two snapshots."""

    @property
    def beside(self) -> bool:
        """Whether snapshots lie beside the weights."""
        return self._device is None

    def choose(self, leaves: Mapping[StateKey, Any]) -> None:
        """Choose the place for good, if that is still to be done.

        Call it after the first updates: activations have had their peak by then, and moments exist.
        """
        chooses, self._choose = self._choose, False
        device = cuda_device(leaves)
        if not chooses or device is None:
            return
        # One more is pending, and the one the fit began with may be there already, without its moments.
        there = sum(snapshot.nbytes() for snapshot in self._ring.certified if not snapshot.homes)
        if not self._memory(device).fits(tensor_bytes(leaves) * (self._ring.capacity + 1) - there):
            self._device = torch.device("cpu")

    def copy(self, step: int, global_step: int, leaves: Mapping[StateKey, Any]) -> Snapshot:
        """Copy the learner; to host memory from now on where the device has no room left.

        Args:
            step: The guard's clock.
            global_step: The trainer's.
            leaves: The learner's leaves.
        """
        try:
            return self._copy(step, global_step, leaves, self._place(leaves))
        except torch.cuda.OutOfMemoryError:
            _logger.warning(
                "NaNGuard: the device has no room for another snapshot at step %d. From now on snapshots lie in host "
                "memory; set snapshot_device='cpu' or max_snapshot_memory to choose this from the start.",
                global_step,
            )
            if self._alone:
                self._ring.shed()
            self._device, self._choose = torch.device("cpu"), False
            return self._copy(step, global_step, leaves, self._device)

    def settle(self) -> None:
        """Before an update: let it wait for copies under way; one whose source was written to meanwhile is dropped."""
        if not self._side_copy.settle():
            self._ring.drop_pending()
            # Whatever has written once, in forward or in a callback, does so again.
            self._overlap, self._side_copy = False, SideStreamCopy()

    def waited(self) -> float | None:
        """Seconds that the run waited for the last copy, ``None`` where that is not known yet."""
        return self._side_copy.waited()

    def _place(self, leaves: Mapping[StateKey, Any]) -> torch.device | None:
        device = cuda_device(leaves)
        if device is None or not self._choose:
            return self._device
        # What room there is shows only after the first updates, which may need it all.
        return None if self._memory(device).is_negligible(tensor_bytes(leaves)) else torch.device("cpu")

    def _memory(self, device: torch.device) -> DeviceMemory:
        return DeviceMemory.of(device, self._limits)

    def _copy(
        self, step: int, global_step: int, leaves: Mapping[StateKey, Any], device: torch.device | None
    ) -> Snapshot:
        take = partial(
            capture, self._learner, step=step, global_step=global_step, device=device, reuse=self._ring.spare()
        )
        on_cuda = {leaf.device for leaf in leaves.values() if isinstance(leaf, Tensor) and leaf.is_cuda}
        if device is None or device.type != "cpu" or not on_cuda:
            return take(leaves=leaves.items())
        if not self._overlap:
            snapshot = take(leaves=leaves.items())
            snapshot.done = [torch.cuda.current_stream(one).record_event() for one in on_cuda]
            return snapshot
        soon = [(key, leaf) for key, leaf in leaves.items() if self._changes_soon(key, leaf)]
        later = [(key, leaf) for key, leaf in leaves.items() if not self._changes_soon(key, leaf)]
        snapshot = take(leaves=soon)

        def copy() -> None:
            rest = take(leaves=later)
            snapshot.leaves.update(rest.leaves)
            snapshot.homes.update(rest.homes)

        snapshot.done = self._side_copy.send(copy, [leaf for _, leaf in later if isinstance(leaf, Tensor)])
        return snapshot

    def _changes_soon(self, key: StateKey, leaf: Any) -> bool:
        # Before the next update, forward writes to buffers, and others write to averages and to a teacher.
        frozen = key[0] == "parameter" and not leaf.requires_grad
        return key[0] in ("buffer", "average") or (frozen and key not in self.unchanged)
