"""Where snapshots lie: beside the weights, or in pinned host memory that a side stream brings them to."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from lightning_nanguard.measure.tensors import local

# Share of a device's memory that is left free: batches differ in size, and the allocator's blocks do not fit exactly.
_RESERVE = 0.05


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of a device, in bytes.

    Attributes:
        total: All of it.
        free: What no process has taken.
        cached: What this process has taken.
        peak: The most of it that was in use at once so far.
    """

    total: int
    free: int
    cached: int
    peak: int

    @classmethod
    def of(cls, device: torch.device) -> DeviceMemory:
        """The memory of a CUDA device now."""
        free, total = torch.cuda.mem_get_info(device)
        return cls(total, free, torch.cuda.memory_reserved(device), torch.cuda.max_memory_allocated(device))

    def fits(self, nbytes: float) -> bool:
        """Whether so much more would have been free even at the peak.

        Example:
            >>> DeviceMemory(total=100, free=30, cached=70, peak=60).fits(30), DeviceMemory(100, 30, 70, 60).fits(36)
            (True, False)
        """
        return nbytes <= self.free + self.cached - self.peak - _RESERVE * self.total

    def is_negligible(self, nbytes: float) -> bool:
        """Whether so much makes no difference."""
        return nbytes <= _RESERVE * self.total


@final
class SideStreamCopy:
    """Copies from a device to the host on a stream of its own, while the run goes on.

    The next update waits for the copy, on the device; forward and backward do not. What forward and others may write
    to before then (buffers, averaged copies) must be copied on the run's own stream.
    """

    def __init__(self) -> None:
        self._monitors: dict[torch.device, Any] = {}
        self._under_way: list[tuple[Any, torch.device]] = []
        self._sources: list[_Source] = []
        self._waits: list[tuple[Any, Any]] = []

    def send(self, copy: Callable[[], Any], tensors: Collection[Tensor]) -> list[Any]:
        """Launch ``copy``, which reads ``tensors`` of CUDA devices; the events that say when it is done."""
        self._sources = [_Source.of(tensor) for tensor in tensors]
        self._waits = []
        with ExitStack() as stack:
            for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
                side = self._side(device)
                side.wait_stream(torch.cuda.current_stream(device))
                stack.enter_context(torch.cuda.stream(side))
                stack.callback(self._mark, side, device)
            copy()
        return [event for event, _ in self._under_way]

    def _side(self, device: torch.device) -> Any:
        if device not in self._monitors:
            self._monitors[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._monitors[device]

    def _mark(self, side: Any, device: torch.device) -> None:
        self._under_way.append((side.record_event(), device))

    def settle(self) -> bool:
        """Let the run's stream wait for what is under way, without the host; whether nobody wrote to it meanwhile."""
        if not self._sources:
            return True
        for event, device in self._under_way:
            stream = torch.cuda.current_stream(device)
            before = stream.record_event(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
            stream.wait_event(event)
            after = stream.record_event(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
            self._waits.append((before, after))
        intact = all(source.is_as_it_was() for source in self._sources)
        self._under_way, self._sources = [], []
        return intact

    def waited(self) -> float | None:
        """Seconds that the run's stream waited for the last copy, ``None`` where that is not known yet."""
        if self._sources or not all(after.query() for _, after in self._waits):
            return None
        return max([before.elapsed_time(after) / 1e3 for before, after in self._waits], default=0.0)


@dataclass(frozen=True, slots=True)
class _Source:
    """A tensor that is being copied.

    Attributes:
        tensor: The tensor itself.
        memory: Its numbers, which are not given to somebody else while this is there, whatever becomes of the tensor.
        version: Of its numbers when the copy began. Writes through ``.data`` leave it as it is.
    """

    tensor: Tensor
    memory: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Source:
        return cls(tensor, local(tensor).detach(), tensor._version)

    def is_as_it_was(self) -> bool:
        return self.tensor._version == self.version and local(self.tensor).data_ptr() == self.memory.data_ptr()
