"""The device of a run: streams, events, pinned memory and room. Nothing else in the package names ``torch.cuda``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor

from lightning_nanguard.state.host_memory import available_host_memory
from lightning_nanguard.thresholds.snapshots import PlacementThresholds

_DEFAULTS = PlacementThresholds()

OutOfMemory = torch.cuda.OutOfMemoryError
"""What torch raises where a device has no memory left."""


class Event(Protocol):
    """A point in the work of a stream."""

    def query(self) -> bool:
        """Whether the work before it is done."""

    def synchronize(self) -> None:
        """Wait on the host until it is."""

    def elapsed_time(self, other: Any) -> float:
        """Milliseconds from this event to another one; both were recorded with ``timed``."""


@final
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


class Driver(Protocol):
    """What a :class:`Device` needs of the hardware; a test gives one of its own."""

    def where(self, tensor: Tensor) -> torch.device | None:
        """The device a tensor lies on, if that works while the host goes on; ``None`` for the host and all others."""

    def own_stream(self, device: torch.device) -> Any:
        """The stream that the run works on."""

    def side_stream(self, device: torch.device) -> Any:
        """A stream that works beside it."""

    def launch(self, stream: Any, work: Callable[[], None]) -> None:
        """Do something on a stream."""

    def to_host(self, stream: Any, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Copy tensors to pinned memory on a stream, without waiting."""

    def record(self, stream: Any, *, timed: bool = False) -> Event:
        """An event behind all that a stream was given so far."""

    def wait(self, stream: Any, event: Any) -> None:
        """Have a stream wait for an event; the host does not."""

    def pinned_like(self, tensor: Tensor) -> Tensor:
        """Uninitialised pinned memory of a tensor's dtype, shape and strides; RuntimeError where there is none."""

    def memory(self, device: torch.device) -> DeviceMemory:
        """Memory of a device now."""

    def release(self) -> None:
        """Give pinned memory that is no longer used back to the host."""


@final
class TorchDriver:
    """CUDA, by torch. Copies from other devices are waited for."""

    def __init__(self) -> None:
        self._sides: dict[torch.device, Any] = {}

    def where(self, tensor: Tensor) -> torch.device | None:
        """The CUDA device of a tensor."""
        return tensor.device if tensor.is_cuda else None

    def own_stream(self, device: torch.device) -> Any:
        """The current stream."""
        return torch.cuda.current_stream(device)

    def side_stream(self, device: torch.device) -> Any:
        """One stream for each device, made when it is first needed."""
        if device not in self._sides:
            self._sides[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._sides[device]

    def launch(self, stream: Any, work: Callable[[], None]) -> None:
        """Do something on a stream."""
        with torch.cuda.stream(stream):
            work()

    def to_host(self, stream: Any, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Copy tensors to pinned memory on a stream, without waiting."""
        with torch.cuda.stream(stream), torch.no_grad():
            torch._foreach_copy_(list(targets), list(sources), non_blocking=True)

    def record(self, stream: Any, *, timed: bool = False) -> Event:
        """An event behind all that a stream was given so far."""
        event: Event = stream.record_event(torch.cuda.Event(enable_timing=timed))  # type: ignore[no-untyped-call]
        return event

    def wait(self, stream: Any, event: Any) -> None:
        """Have a stream wait for an event."""
        stream.wait_event(event)

    def pinned_like(self, tensor: Tensor) -> Tensor:
        """Uninitialised pinned memory like a tensor."""
        return torch.empty_like(tensor, device="cpu", pin_memory=True, requires_grad=False)

    def memory(self, device: torch.device) -> DeviceMemory:
        """Memory of a device now."""
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory(
            total, free, torch.cuda.memory_reserved(device), torch.cuda.max_memory_allocated(device)
        )  # fmt: skip

    def release(self) -> None:
        """Give pinned memory that is no longer used back to the host, where this torch can."""
        empty = getattr(torch._C, "_host_emptyCache", None)
        if empty is not None and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            empty()


@final
class HostCopy:
    """Brings a few numbers to the host without waiting for the device until they are read.

    Args:
        numbers: One-dimensional, on any device.
        driver: Copies them.
    """

    def __init__(self, numbers: Tensor, driver: Driver) -> None:
        numbers = numbers.detach()
        self._done: Event | None = None
        device = driver.where(numbers)
        if device is None:
            # On a device without events the copy is made when it is read: nothing else tells when one has arrived.
            self._numbers = numbers.clone()
            return
        self._numbers = driver.pinned_like(numbers)
        stream = driver.own_stream(device)
        driver.to_host(stream, [self._numbers], [numbers])
        self._done = driver.record(stream)

    def arrived(self) -> bool:
        """Whether :meth:`read` would not wait for the device."""
        return self._done is None or self._done.query()

    def read(self) -> list[float]:
        """The numbers; waits until they are there."""
        if self._done is not None:
            self._done.synchronize()
        numbers: list[float] = self._numbers.tolist()
        return numbers


@final
class Device:
    """All that the guard does with the device of a run, beside computing.

    Args:
        driver: The hardware.
        host_memory: Gives the bytes that processes of this host can still take.
        clock: Gives the time in seconds.
    """

    def __init__(
        self,
        driver: Driver | None = None,
        host_memory: Callable[[], int] = available_host_memory,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.driver: Driver = TorchDriver() if driver is None else driver
        self.host_memory = host_memory
        self._clock = clock
        self.pinning = 0.0
        """Seconds spent on allocating pinned memory so far; what was allocated once is used again."""

    def where(self, tensor: Tensor) -> torch.device | None:
        """The device a tensor lies on, if that works while the host goes on."""
        return self.driver.where(tensor)

    def devices(self, values: Iterable[Any]) -> list[torch.device]:
        """The devices that the tensors among some values lie on."""
        found = (self.where(value) for value in values if isinstance(value, Tensor))
        return list(dict.fromkeys(one for one in found if one is not None))

    def read_later(self, numbers: Tensor) -> HostCopy:
        """Send a few numbers to the host without waiting for them."""
        return HostCopy(numbers, self.driver)

    def pinned_like(self, tensor: Tensor) -> Tensor:
        """Host memory like a tensor, pinned where the host has enough: a copy goes on beside the run only into such."""
        started = self._clock()
        try:
            return self.driver.pinned_like(tensor)
        except RuntimeError:
            return torch.empty_like(tensor, device="cpu", requires_grad=False)
        finally:
            self.pinning += self._clock() - started

    def pinned_alike(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Host memory like each of some tensors, pinned where the host has enough, in few blocks."""
        found: dict[int, Tensor] = {}
        for nbytes, places in host_blocks([tensor.nbytes for tensor in tensors]):
            block = self.pinned_like(torch.empty(nbytes, dtype=torch.uint8, device="meta"))
            for index, start in places.items():
                like = tensors[index]
                # Of the same strides where the tensor has no gaps.
                strides = torch.empty_like(like, device="meta").stride()
                part = block[start : start + like.nbytes].view(like.dtype)
                found[index] = part.as_strided(like.shape, strides, part.storage_offset())
        return [found[index] for index in range(len(tensors))]

    def to_host(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Copy tensors of one device to the host in the order of the run's work, without waiting for it."""
        device = self.where(sources[0])
        assert device is not None
        self.driver.to_host(self.driver.own_stream(device), targets, sources)

    def mark(self, values: Iterable[Any], *, timed: bool = False) -> list[Event]:
        """Events behind what the run was given so far, one for each device that holds some of the values."""
        driver = self.driver
        return [driver.record(driver.own_stream(one), timed=timed) for one in self.devices(values)]

    def timer(self, values: Iterable[Any]) -> DeviceTimer:
        """Begin to measure for how long the devices of some tensors work."""
        return DeviceTimer(self, list(values))


@final
class DeviceTimer:
    """Measures for how long devices work on something, without waiting for them.

    Args:
        device: The device.
        values: Tensors whose devices are measured; nothing is measured where they lie on none.
    """

    def __init__(self, device: Device, values: Sequence[Any] = ()) -> None:
        self._device = device
        self._values = values
        self._began = device.mark(values, timed=True)
        self._ended: list[Event] = []

    def stop(self) -> None:
        """What is measured has been launched."""
        self._ended = self._device.mark(self._values, timed=True)
        self._values = ()

    def seconds(self) -> float | None:
        """How long the slowest device took; ``None`` if that is not known yet, or nothing was measured."""
        if not self._ended or not all(event.query() for event in self._ended):
            return None
        return max(began.elapsed_time(ended) / 1e3 for began, ended in zip(self._began, self._ended, strict=True))


def pinned_bytes(nbytes: int) -> int:
    """What torch takes of the host for pinned memory: its allocator rounds each block up to a power of two.

    Example:
        >>> pinned_bytes(0), pinned_bytes(8), pinned_bytes(9)
        (0, 8, 16)
    """
    return 1 << (nbytes - 1).bit_length() if nbytes else 0


def host_blocks(sizes: Sequence[int], thresholds: PlacementThresholds = _DEFAULTS) -> list[tuple[int, dict[int, int]]]:
    """How tensors share blocks of pinned memory, each of which is a power of two, so that none is rounded up.

    Args:
        sizes: Bytes of the tensors.
        thresholds: How large a block may be.

    Returns:
        For each block its bytes, and the places of the tensors in it: which tensor, and at what byte it begins.

    Example:
        >>> [nbytes for nbytes, _ in host_blocks([3 << 20, 3 << 20, 2 << 20])], pinned_bytes(3 << 20)
        ([8388608], 4194304)
    """
    unit = thresholds.host_alignment
    left = sorted(((-(-size // unit) * unit, index) for index, size in enumerate(sizes)), reverse=True)
    blocks: list[tuple[int, dict[int, int]]] = []
    while left:
        rest = sum(size for size, _ in left)
        # The largest block that is filled; the last one may be filled in part.
        full = 1 << (max(rest, 1).bit_length() - 1)
        wanted = full if full >= thresholds.least_block else pinned_bytes(rest)
        nbytes = max(min(wanted, thresholds.largest_block), pinned_bytes(left[0][0]))
        places, used, others = {}, 0, []
        for size, index in left:
            if used + size <= nbytes:
                places[index] = used
                used += size
            else:
                others.append((size, index))
        blocks.append((nbytes, places))
        left = others
    return blocks


def random_generator(device: torch.device) -> torch.Generator | None:
    """The random generator that modules on a device draw from, where that is not the host's."""
    if device.type != "cuda":
        return None
    generator: torch.Generator = torch.cuda.default_generators[device.index or 0]
    return generator
