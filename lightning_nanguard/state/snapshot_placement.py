"""Keeps snapshots on the device or in host memory, and copies the learner there while the run continues."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from lightning_nanguard.measure.tensors import is_strided, local
from lightning_nanguard.state.device import OutOfMemory
from lightning_nanguard.state.learner import Learner, StateKey
from lightning_nanguard.state.ring import Ring
from lightning_nanguard.state.side_copy import SideCopy
from lightning_nanguard.state.snapshot import Snapshot, capture, copy_all
from lightning_nanguard.state.snapshot_room import NOWHERE, DevicePeaks, Place, Room, SnapshotSize, choose_place
from lightning_nanguard.thresholds.snapshots import PlacementThresholds

_logger = logging.getLogger("lightning_nanguard")
_HOST = torch.device("cpu")


@final
class SnapshotPlacement:
    """Copies the learner to where snapshots are kept: on the device of the weights, or in host memory.

    Place and number of the snapshots depend on the free memory. They only ever shrink, because the run's peak only
    grows.

    Args:
        learner: The learner of the run.
        ring: Stores the snapshots. Its memory is used again.
        device: Where snapshots are kept; ``None`` for the device of the originals.
        choose: Whether host memory is chosen if a device has no room for snapshots.
        alone: Whether this is the only process. Several ranks keep the same snapshots, so they change the place only
            when all have reported theirs (:meth:`hear`).
        sharers: Number of processes on this host.
        parts: Number of processes that store a certified snapshot together.
        limit: Limit in bytes for all snapshots together.
        others: Bytes that other things take from the limit.
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
        sharers: int = 1,
        parts: int = 1,
        limit: float = math.inf,
        others: Callable[[], int] = int,
        thresholds: PlacementThresholds = PlacementThresholds(),
    ) -> None:
        self._learner = learner
        self._ring = ring
        self._choose = choose and device is None
        self._in_host = device is not None
        self._alone = alone
        self._sharers = sharers
        self._parts = parts
        self._limit = limit
        self._others = others
        self._limits = thresholds
        self._peaks = DevicePeaks(thresholds)
        self._side_copy = SideCopy(learner.device, thresholds)
        self._overlap = True
        # The present place, the wanted place, and the least bytes of snapshots beside the weights since the last check.
        self._place: Place | None = None
        self._wanted: Place | None = None
        self._held: float = math.inf
        self._one: SnapshotSize | None = None
        self._settled = 0
        self.unchanged: AbstractSet[StateKey] = frozenset()
        """State keys of tensors that did not change between the last two snapshots."""

    @property
    def beside(self) -> bool:
        """Whether snapshots are kept on the device of the weights."""
        return not self._in_host if self._place is None else self._place.beside

    def is_nowhere(self) -> bool:
        """Whether there is no room for any snapshot."""
        return self._place is not None and self._place.certified == 0

    def where(self) -> torch.device | None:
        """Where copies of a part of the learner are kept: where snapshots are; ``None`` for beside the original."""
        return None if self.beside else _HOST

    def look_at_room(self, leaves: Mapping[StateKey, Any] | None = None) -> None:
        """Choose a place that needs less memory if the present one needs too much. Nothing moves to a larger place.

        Call it after the first updates, when activations have reached their peak and moments exist, and regularly
        after.

        Args:
            leaves: The learner's leaves; ``None`` if their sizes have not changed since the last call.
        """
        if self.is_nowhere():
            return
        one = self._one
        if one is None or leaves is not None:
            one = SnapshotSize.of(dict(self._learner.leaves()) if leaves is None else leaves, self._learner.device)
            self._one = one
        most = self._ring.capacity if self._place is None else self._place.certified
        fixed_host = self._in_host or (self._place is not None and not self._place.beside)
        wanted = choose_place(
            one,
            self._room(one),
            most,
            beside=not fixed_host or not one.beside,
            in_host=self._in_host or self._choose,
        )
        if wanted == NOWHERE and one.beside and not fixed_host and not self._choose:
            wanted = Place(True, 1)  # as the user wants it; if memory runs out, they go to the host
        elif fixed_host:
            wanted = Place(False, wanted.certified)
        self._wanted = wanted
        if self._alone:
            self._take(wanted)

    def wanted(self) -> int:
        """Where this rank alone would keep snapshots, as :meth:`Place.code`, for a report; ``-1`` if that is open."""
        return -1 if self._wanted is None else self._wanted.code()

    def hear(self, wanted: Sequence[int]) -> None:
        """Use the place of the rank with the least room. All ranks must be given the same at the same point.

        Args:
            wanted: The result of :meth:`wanted` on each rank.
        """
        code = min(wanted)
        if code >= 0 and (self._place is None or code != self._place.code()):
            self._take(Place.of_code(code))

    def _room(self, one: SnapshotSize) -> Room:
        device, limits = self._learner.device, self._limits
        kept = self._ring.all()
        held = sum(snapshot.nbytes() for snapshot in kept if not snapshot.homes)
        in_host = sum(SnapshotSize.of(snapshot.leaves, device).in_host for snapshot in kept if snapshot.homes)
        share = 1 / max(1, len(one.beside))
        on = {
            where: self._peaks.room(where, device.driver.memory(where), int(share * min(held, self._held)))
            for where in one.beside
        }
        self._held = held
        if not one.beside:
            in_host = held
        available = device.host_memory() * (1 - limits.host_reserve) / self._sharers
        return Room(on, available + in_host, self._parts, self._limit, self._others())

    def _take(self, place: Place) -> None:
        before, self._place = self._place, place
        if place.certified == 0:
            self._ring.clear()
            _logger.warning(
                "NaNGuard: neither the device nor the host has room for two snapshots, so none are kept. Bad batches "
                "are still skipped, but if the weights are lost, the run stops. Set last_good_every_n_steps, so that "
                "there is a good checkpoint on disk."
            )
            return
        was_beside = not self._in_host if before is None else before.beside
        if was_beside and not place.beside:
            self._to_host()
        if place.certified < self._ring.capacity or place.beside != was_beside:
            self._ring.shrink(place.certified)
            _logger.info(
                "NaNGuard: from now on up to %d snapshots are kept %s: there is no room for more.",
                place.certified + 1,
                "on the device of the weights" if place.beside else "in host memory",
            )

    def _to_host(self) -> None:
        if self._alone:  # the device needs the room: only the newest certified state is moved
            self._ring.shed()
        for snapshot in self._ring.all():
            self._move(snapshot)

    def _move(self, snapshot: Snapshot) -> None:
        device = self._learner.device
        moved = [
            (key, leaf)
            for key, leaf in snapshot.leaves.items()
            if isinstance(leaf, Tensor) and is_strided(leaf) and device.where(leaf) is not None
        ]
        for (key, leaf), memory in zip(moved, device.pinned_alike([leaf for _, leaf in moved]), strict=True):
            snapshot.homes[key] = leaf.device
            device.to_host([memory], [leaf])
            snapshot.leaves[key] = memory
        snapshot.done += device.mark(leaf for _, leaf in self._learner.weights())

    def copy(
        self, step: int, global_step: int, leaves: Mapping[StateKey, Any], *, beside_run: bool = True
    ) -> Snapshot | None:
        """Copy the learner. If the device has no room left, use host memory from now on; ``None`` if neither has room.

        Args:
            step: Number of the last update.
            global_step: ``global_step`` of the trainer.
            leaves: The leaves of the learner.
            beside_run: Whether a copy to the host may be made in the background.
        """
        if self.is_nowhere():
            return None
        snapshot: Snapshot | None = None
        try:
            snapshot = self._copy(step, global_step, leaves, self._goes_to_host(leaves), beside_run)
        except OutOfMemory:
            _logger.warning(
                "NaNGuard: the device has no room for another snapshot at step %d. From now on snapshots are in host "
                "memory. Set snapshot_device='cpu' or max_snapshot_memory to choose this from the start.",
                global_step,
            )
        if snapshot is None:
            self._to_host()
            self._in_host, self._choose = True, False
            self._place = Place(False, self._ring.capacity)
            self.look_at_room(leaves)
            snapshot = None if self.is_nowhere() else self._copy(step, global_step, leaves, True, False)
        return snapshot

    def close(self) -> None:
        """Free all memory except that of the snapshots."""
        self._side_copy.settle()
        self._side_copy = SideCopy(self._learner.device, self._limits)
        self._learner.device.driver.release()

    def settle(self) -> None:
        """Let the next update, or other write to the learner, wait for copies that are under way.

        At regular intervals check whether a device is too full.
        """
        self._side_copy.settle()
        self._settled += 1
        on_device = self._place is not None and self._one is not None and self._one.beside
        if on_device and self._settled % self._limits.looked_every == 0:
            self.look_at_room()

    def torn(self) -> None:
        """Stop copies in the background, because something wrote to a source while it was copied."""
        if self._overlap:
            _logger.info(
                "NaNGuard: weights or moments were changed while they were copied, so the snapshot was dropped. From "
                "now on the run waits for each copy."
            )
        self._overlap, self._side_copy = False, SideCopy(self._learner.device, self._limits)

    def waited(self) -> float | None:
        """Seconds that the run waited for the last copy; ``None`` if that is not known yet."""
        return self._side_copy.waited()

    def _goes_to_host(self, leaves: Mapping[StateKey, Any]) -> bool:
        if self._place is not None or not self._choose:
            return not self.beside
        # The first updates may need all memory. Only after them is it known how much room there is.
        device = self._learner.device
        return any(
            nbytes > self._limits.memory_reserve * device.driver.memory(where).total
            for where, nbytes in SnapshotSize.of(leaves, device).beside.items()
        )

    def _copy(
        self, step: int, global_step: int, leaves: Mapping[StateKey, Any], in_host: bool, beside_run: bool
    ) -> Snapshot:
        device = self._learner.device
        take = partial(
            capture,
            self._learner,
            step=step,
            global_step=global_step,
            device=_HOST if in_host else None,
            reuse=self._ring.spare(),
        )
        if not in_host or not device.devices(leaves.values()):
            return take(leaves=leaves.items())
        later = {key: leaf for key, leaf in leaves.items() if beside_run and self._can_wait(key, leaf)}
        snapshot = take(leaves=[(key, leaf) for key, leaf in leaves.items() if key not in later])
        if later:
            self._copy_beside(take, later, snapshot)
        return snapshot

    def _copy_beside(self, take: Callable[..., Snapshot], later: Mapping[StateKey, Any], snapshot: Snapshot) -> None:
        def send(targets: list[Tensor], sources: list[Tensor]) -> None:
            values = [local(source).detach() for source in sources]
            try:
                snapshot.check = self._side_copy.send(targets, values)
            except OutOfMemory:  # there is no room even for the staging memory
                self._overlap, self._side_copy = False, SideCopy(self._learner.device, self._limits)
                copy_all(targets, values, self._learner.device)
                snapshot.done += self._learner.device.mark(values)

        rest = take(leaves=later.items(), copy=send)
        snapshot.leaves.update(rest.leaves)
        snapshot.homes.update(rest.homes)
        snapshot.left_out |= rest.left_out
        snapshot.done += snapshot.check.events

    def _can_wait(self, key: StateKey, leaf: Any) -> bool:
        if not self._overlap or not isinstance(leaf, Tensor) or self._learner.device.where(leaf) is None:
            return False
        # Before the next update the forward pass writes to buffers, and other code to averages and to a teacher.
        frozen = key[0] == "parameter" and not leaf.requires_grad
        if key[0] in ("buffer", "average") or (frozen and key not in self.unchanged):
            return False
        return is_strided(local(leaf)) and self._side_copy.can_take(local(leaf).detach())
