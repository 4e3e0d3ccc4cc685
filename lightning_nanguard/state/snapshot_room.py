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

_DEFAULTS = PlacementThresholds()


_MANY = 1 << 6


@final
class Place(NamedTuple):
    """Where snapshots lie and how many are kept.

    Attributes:
        beside: Whether they lie beside the weights; else in host memory.
        certified: Number of certified snapshots, beside which one is pending; 0 if there is room for none.
    """

    beside: bool
    certified: int

    def code(self) -> int:
        """The place as a number of seven bits; the lower one of two has less room."""
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
        beside: Bytes on each device, where it lies beside the weights.
        in_host: Bytes of the host, where it lies there; what torch's allocator rounds up is counted.
        at_home: Bytes of the host that a snapshot beside the weights takes: those of tensors that lie there.
    """

    beside: Mapping[torch.device, int]
    in_host: int
    at_home: int = 0

    @classmethod
    def of(cls, leaves: Mapping[Any, Any], device: Device) -> SnapshotSize:
        """What a copy of some leaves takes."""
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
        """What a copy of the learner will take; moments come with the first steps, and Adam has two a parameter."""
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
        on: On each device, beside what the run takes at its peak.
        in_host: In the host, the share of this process.
        parts: Number of processes that keep a certified snapshot together.
        limit: What the user allows; no limit by default.
        others: What batches take of the limit. One certified snapshot goes before them.
    """

    on: Mapping[torch.device, float]
    in_host: float
    parts: int = 1
    limit: float = math.inf
    others: int = 0

    def fits(self, one: SnapshotSize, place: Place) -> bool:
        """Whether so many snapshots fit there."""
        # The pending one is whole, and it is what a certified one is split from.
        copies = 1 + place.certified / self.parts
        if copies * one.total(beside=place.beside) > self.limit - (self.others if place.certified > 1 else 0):
            return False
        if not place.beside:
            return copies * one.in_host <= self.in_host
        on_devices = all(copies * nbytes <= self.on[where] for where, nbytes in one.beside.items())
        return on_devices and copies * one.at_home <= self.in_host


def choose_place(one: SnapshotSize, room: Room, most: int, *, beside: bool = True, in_host: bool = True) -> Place:
    """The best place that has room: as many snapshots beside the weights as fit, else as many as fit in host memory.

    Args:
        one: What one snapshot takes.
        room: What all may take.
        most: Certified snapshots wanted.
        beside: Whether they may lie beside the weights.
        in_host: Whether they may lie in host memory.
    """
    places = [Place(True, count) for count in range(most, 0, -1) if beside]
    if one.beside:
        places += [Place(False, count) for count in range(most, 0, -1) if in_host]
    return next((place for place in places if room.fits(one, place)), NOWHERE)


@final
@dataclass(slots=True)
class DevicePeaks:
    """What the run takes of devices at its peak without snapshots, though they are part of what torch counts.

    Attributes:
        thresholds: What is left free.
    """

    thresholds: PlacementThresholds = _DEFAULTS
    _seen: dict[torch.device, int] = field(default_factory=dict)
    _without: dict[torch.device, int] = field(default_factory=dict)

    def room(self, where: torch.device, memory: DeviceMemory, held: int) -> float:
        """Bytes that snapshots may take on a device.

        Args:
            where: The device.
            memory: Its memory now.
            held: Least bytes of snapshots that lay there since the last call.
        """
        if memory.peak > self._seen.get(where, 0):
            self._without[where] = max(self._without.get(where, 0), memory.peak - held)
        self._seen[where] = memory.peak
        reserve = self.thresholds.memory_reserve * memory.total
        return memory.free + memory.cached - self._without[where] - reserve
