"""Decides by the free memory of device and host where snapshots are kept, and how many."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from lightning_nanguard.measure.tensors import local, size
from lightning_nanguard.state.device import Device, DeviceMemory, host_blocks
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.thresholds.snapshots import PlacementThresholds

_MANY = 1 << 6


@final
class Place(NamedTuple):
    """Where snapshots are kept, and how many.

    Attributes:
        beside: Whether they are on the device of the weights; else they are in host memory.
        certified: Number of certified snapshots. One pending one comes in addition. 0 if there is no room for any.
    """

    beside: bool
    certified: int

    def code(self) -> int:
        """The place as a number of seven bits. Of two places the one with the lower number needs less room."""
        return min(self.certified, _MANY - 1) + _MANY * self.beside

    @classmethod
    def of_code(cls, code: int) -> Place:
        """The inverse of :meth:`code`."""
        return cls(code >= _MANY, code % _MANY)


NOWHERE = Place(False, 0)
"""There is no room for snapshots."""


@final
@dataclass(frozen=True, slots=True)
class SnapshotSize:
    """Bytes that one snapshot takes.

    Attributes:
        beside: Bytes on each device, if it is kept on the device of the weights.
        in_host: Bytes in host memory, if it is kept there, with what torch's allocator adds by rounding up.
        at_home: Bytes in host memory of a snapshot beside the weights: those of tensors that are there themselves.
    """

    beside: Mapping[torch.device, int]
    in_host: int
    at_home: int = 0

    @classmethod
    def of(cls, leaves: Mapping[Any, Any], device: Device) -> SnapshotSize:
        """The size of a copy of some leaves."""
        beside: dict[torch.device, int] = {}
        sizes: list[int] = []
        at_home = 0
        for leaf in leaves.values():
            if not isinstance(leaf, Tensor):
                continue
            nbytes, where = size(local(leaf)), device.where(leaf)
            if where is None:
                at_home += nbytes
            else:
                beside[where] = beside.get(where, 0) + nbytes
                sizes.append(nbytes)
        return cls(beside, at_home + sum(nbytes for nbytes, _ in host_blocks(sizes)), at_home)

    @classmethod
    def expected(cls, learner: Learner) -> SnapshotSize:
        """The expected size of a copy of the learner. Before the first step it counts two moments a parameter."""
        leaves = dict(learner.leaves())
        if not any(key[0] == "optimizer" for key in leaves):
            indices = range(len(learner.optimizers))
            trained = [one for index in indices for one in learner.stepped(index) if one.requires_grad]
            leaves |= {("moment", i): one for i, one in enumerate([*trained, *trained])}
        return cls.of(leaves, learner.device)

    def total(self, *, beside: bool) -> int:
        """Bytes in all memories together."""
        return sum(self.beside.values()) + self.at_home if beside else self.in_host


@final
@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that all snapshots together may take.

    Attributes:
        on: Free bytes on each device at the peak of the run.
        in_host: Free bytes in host memory, the share of this process.
        parts: Number of processes that store a certified snapshot together.
        limit: Limit set by the user; by default none.
        others: Bytes of the limit that stored batches take. One certified snapshot has priority over them.
    """

    on: Mapping[torch.device, float]
    in_host: float
    parts: int = 1
    limit: float = math.inf
    others: int = 0

    def fits(self, one: SnapshotSize, place: Place) -> bool:
        """Whether the snapshots of a place fit into the memory."""
        # The pending snapshot is whole. A certified one is split, and each rank stores a part.
        copies = 1 + place.certified / self.parts
        if copies * one.total(beside=place.beside) > self.limit - (self.others if place.certified > 1 else 0):
            return False
        if not place.beside:
            return copies * one.in_host <= self.in_host
        on_devices = all(copies * nbytes <= self.on[where] for where, nbytes in one.beside.items())
        return on_devices and copies * one.at_home <= self.in_host


def choose_place(one: SnapshotSize, room: Room, most: int, *, beside: bool = True, in_host: bool = True) -> Place:
    """The best place with enough room: as many snapshots as fit beside the weights, else as many as fit in host memory.

    Args:
        one: Size of one snapshot.
        room: Room for all snapshots.
        most: Number of certified snapshots wanted.
        beside: Whether they may be on the device of the weights.
        in_host: Whether they may be in host memory.
    """
    places = [Place(True, count) for count in range(most, 0, -1) if beside]
    if one.beside:
        places += [Place(False, count) for count in range(most, 0, -1) if in_host]
    return next((place for place in places if room.fits(one, place)), NOWHERE)


@final
@dataclass(slots=True)
class DevicePeaks:
    """Computes the peak memory of the run on each device without snapshots, which torch counts too.

    Attributes:
        thresholds: What stays free.
    """

    thresholds: PlacementThresholds = PlacementThresholds()
    _seen: dict[torch.device, int] = field(default_factory=dict)
    _without: dict[torch.device, int] = field(default_factory=dict)

    def room(self, where: torch.device, memory: DeviceMemory, held: int) -> float:
        """Bytes that snapshots may take on a device.

        Args:
            where: The device.
            memory: Its memory now.
            held: Least bytes of snapshots on the device since the last call.
        """
        if memory.peak > self._seen.get(where, 0):
            self._without[where] = max(self._without.get(where, 0), memory.peak - held)
        self._seen[where] = memory.peak
        reserve = self.thresholds.memory_reserve * memory.total
        return memory.free + memory.cached - self._without[where] - reserve
