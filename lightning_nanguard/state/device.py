"""All that snapshots need to know of CUDA devices: room, time, and copies on a stream of their own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from lightning_nanguard.measure.tensors import local
from lightning_nanguard.thresholds.snapshots import PlacementThresholds

_DEFAULTS = PlacementThresholds()


def cuda_device(leaves: Mapping[Any, Any]) -> torch.device | None:
    """The CUDA device of the first tensor that lies on one, ``None`` if none does."""
    return next((leaf.device for leaf in leaves.values() if isinstance(leaf, Tensor) and leaf.is_cuda), None)


@final
@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of a device, in bytes.

    Attributes:
        total: All of it.
        free: What no process has taken.
        cached: What this process has taken.
        peak: The most of it that was in use at once so far.
        thresholds: What counts as room.
    """

    total: int
    free: int
    cached: int
    peak: int
    thresholds: PlacementThresholds = _DEFAULTS

    @classmethod
    def of(cls, device: torch.device, thresholds: PlacementThresholds = _DEFAULTS) -> DeviceMemory:
        """The memory of a CUDA device now."""
        free, total = torch.cuda.mem_get_info(device)
        cached, peak = torch.cuda.memory_reserved(device), torch.cuda.max_memory_allocated(device)
        return cls(total, free, cached, peak, thresholds)

    def fits(self, nbytes: float) -> bool:
        """Whether so much more would have been free even at the peak.

        Example:
            >>> DeviceMemory(total=100, free=30, cached=70, peak=60).fits(30), DeviceMemory(100, 30, 70, 60).fits(36)
            (True, False)
        """
        return nbytes <= self.free + self.cached - self.peak - self.thresholds.memory_reserve * self.total

    def is_negligible(self, nbytes: float) -> bool:
        """Whether so much makes no difference."""
        return nbytes <= self.thresholds.negligible_share * self.total


@final
class DeviceTimer:
    """Measures for how long a CUDA device works on something, without waiting for it."""

    def __init__(self) -> None:
        self._device: torch.device | None = None
        self._began: Any = None
        self._events: tuple[Any, Any] | None = None

    def start(self, device: torch.device | None) -> None:
        """What is measured begins; nothing is where there is no device."""
        self._device = device
        self._began = None if device is None else _timed_event(device)

    def stop(self) -> None:
        """What is measured has been launched."""
        if self._device is not None:
            self._events = self._began, _timed_event(self._device)

    def seconds(self) -> float | None:
        """How long it took; ``None`` where that is not known yet, or nothing was measured."""
        if self._events is None or not self._events[1].query():
            return None
        began, ended = self._events
        return float(began.elapsed_time(ended)) / 1e3


@final
class SideStreamCopy:
    """Copies from a device to the host on a stream of its own, while the run goes on.

    The next update waits for the copy, on the device; forward and backward do not. What forward and others may write
    to before then (buffers, averaged copies) must be copied on the run's own stream.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}
        self._under_way: list[tuple[Any, torch.device]] = []
        self._sources: list[_Source] = []
        self._waits: list[tuple[Any, Any]] = []

    def send(self, copy: Callable[[], Any], tensors: Collection[Tensor]) -> list[Any]:
        """Launch ``copy``, which reads ``tensors`` of CUDA devices; gives the events that say when it is done."""
        self._sources = [_Source.of(tensor) for tensor in tensors]
        self._waits = []
        with ExitStack() as stack:
            for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
                side = self._stream(device)
                side.wait_stream(torch.cuda.current_stream(device))
                stack.enter_context(torch.cuda.stream(side))
                stack.callback(self._mark, side, device)
            copy()
        return [event for event, _ in self._under_way]

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]

    def _mark(self, side: Any, device: torch.device) -> None:
        self._under_way.append((side.record_event(), device))

    def settle(self) -> bool:
        """Let the run's stream wait for copies under way, without the host; whether nobody wrote to their sources."""
        if not self._sources:
            return True
        for event, device in self._under_way:
            before = _timed_event(device)
            torch.cuda.current_stream(device).wait_event(event)
            self._waits.append((before, _timed_event(device)))
        intact = all(source.is_unchanged() for source in self._sources)
        self._under_way, self._sources = [], []
        return intact

    def waited(self) -> float | None:
        """Seconds that the run's stream waited for the last copy, ``None`` where that is not known yet."""
        if self._sources or not all(after.query() for _, after in self._waits):
            return None
        return max([before.elapsed_time(after) / 1e3 for before, after in self._waits], default=0.0)


def _timed_event(device: torch.device) -> Any:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return torch.cuda.current_stream(device).record_event(event)


@dataclass(frozen=True, slots=True)
class _Source:
    """A tensor that is being copied.

    Attributes:
        tensor: The tensor itself.
        memory: Its numbers; while this exists, the allocator gives their memory to nobody else.
        version: Version of its numbers when the copy began. Writes through ``.data`` do not change it.
    """

    tensor: Tensor
    memory: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Source:
        return cls(tensor, local(tensor).detach(), tensor._version)

    def is_unchanged(self) -> bool:
        return self.tensor._version == self.version and local(self.tensor).data_ptr() == self.memory.data_ptr()
