"""Where snapshots lie: beside the weights, or in pinned host memory that a side stream brings them to."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

# Share of a device's memory that is left free: batches differ in size, and the allocator's blocks do not fit exactly.
_RESERVE = 0.05


@dataclass(frozen=True, slots=True)
class Room:
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
    def of(cls, device: torch.device) -> Room:
        """The memory of a CUDA device now."""
        free, total = torch.cuda.mem_get_info(device)
        return cls(total, free, torch.cuda.memory_reserved(device), torch.cuda.max_memory_allocated(device))

    def fits(self, nbytes: float) -> bool:
        """Whether so much more would have been free even at the peak.

        Example:
            >>> Room(total=100, free=30, cached=70, peak=60).fits(30), Room(100, 30, 70, 60).fits(36)
            (True, False)
        """
        return nbytes <= self.free + self.cached - self.peak - _RESERVE * self.total


@final
class Courier:
    """Copies from a device to the host on a stream of its own, while the run goes on.

    The next update waits for the copy, on the device; forward and backward do not. What forward and others may write
    to before then (buffers, averaged copies) must be copied on the run's own stream.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}
        self._under_way: list[tuple[Any, torch.device]] = []
        self._written: list[tuple[Tensor, int]] = []

    def send(self, copy: Callable[[], Any], tensors: Collection[Tensor]) -> list[Any]:
        """Launch ``copy``, which reads ``tensors`` of CUDA devices; the events that say when it is done."""
        # They are kept until then, so that their memory is not given to somebody else.
        self._written = [(tensor, tensor._version) for tensor in tensors]
        with ExitStack() as stack:
            for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
                side = self._side(device)
                side.wait_stream(torch.cuda.current_stream(device))
                stack.enter_context(torch.cuda.stream(side))
                stack.callback(self._mark, side, device)
            copy()
        return [event for event, _ in self._under_way]

    def _side(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]

    def _mark(self, side: Any, device: torch.device) -> None:
        self._under_way.append((side.record_event(), device))

    def settle(self) -> bool:
        """Let the run's stream wait for what is under way, without the host; whether nobody wrote to it meanwhile."""
        if not self._written:
            return True
        for event, device in self._under_way:
            torch.cuda.current_stream(device).wait_event(event)
        intact = all(tensor._version == version for tensor, version in self._written)
        self._under_way, self._written = [], []
        return intact
