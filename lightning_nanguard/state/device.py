"""The device of a run: streams, events, pinned memory and free memory. Only this module uses ``torch.cuda``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor

from lightning_nanguard.state.host_memory import available_host_memory
from lightning_nanguard.thresholds.fixed import HOST_ALIGNMENT, LARGEST_BLOCK, LEAST_BLOCK

OutOfMemory = torch.cuda.OutOfMemoryError
"""The exception that torch raises if a device has no memory left."""


class Event(Protocol):
    """A point in the work of a stream."""

    def query(self) -> bool:
        """Whether the work before the event is done."""

    def synchronize(self) -> None:
        """Let the host wait until the work before the event is done."""

    def elapsed_time(self, other: Any) -> float:
        """Milliseconds from this event to another one. Both must be recorded with ``timed``."""


@final
@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of a device, in bytes.

    Attributes:
        total: All memory of the device.
        free: Memory that no process has taken.
        cached: Memory that this process has taken.
        peak: The most memory that this process has used at once so far.
    """

    total: int
    free: int
    cached: int
    peak: int


@final
class Driver:
    """The operations of the hardware that a :class:`Device` needs: CUDA, through torch.

    Copies from other devices are synchronous. Tests have a driver of their own with the same methods.
    """

    def __init__(self) -> None:
        self._sides: dict[torch.device, Any] = {}

    def where(self, tensor: Tensor) -> torch.device | None:
        """The device of a tensor, if it works asynchronously to the host; else ``None``, as for the host itself."""
        return tensor.device if tensor.is_cuda else None

    def own_stream(self, device: torch.device) -> Any:
        """The stream on which the run works."""
        return torch.cuda.current_stream(device)

    def side_stream(self, device: torch.device) -> Any:
        """A stream beside that of the run."""
        if device not in self._sides:
            self._sides[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._sides[device]

    def launch(self, stream: Any, work: Callable[[], None]) -> None:
        """Run a function on a stream."""
        with torch.cuda.stream(stream):
            work()

    def to_host(self, stream: Any, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Copy tensors to pinned memory on a stream, without waiting."""
        with torch.cuda.stream(stream), torch.no_grad():
            torch._foreach_copy_(list(targets), list(sources), non_blocking=True)

    def record(self, stream: Any, *, timed: bool = False) -> Event:
        """Record an event after all work that a stream was given so far."""
        event: Event = stream.record_event(torch.cuda.Event(enable_timing=timed))  # type: ignore[no-untyped-call]
        return event

    def wait(self, stream: Any, event: Any) -> None:
        """Let a stream wait for an event. The host does not wait."""
        stream.wait_event(event)

    def pinned_like(self, tensor: Tensor) -> Tensor:
        """Uninitialised pinned memory with a tensor's dtype, shape and strides; RuntimeError if there is none."""
        return torch.empty_like(tensor, device="cpu", pin_memory=True, requires_grad=False)

    def memory(self, device: torch.device) -> DeviceMemory:
        """The present memory of a device."""
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory(
            total, free, torch.cuda.memory_reserved(device), torch.cuda.max_memory_allocated(device)
        )  # fmt: skip

    def release(self) -> None:
        """Return unused pinned memory to the host, if this version of torch can."""
        empty = getattr(torch._C, "_host_emptyCache", None)
        if empty is not None and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            empty()


@final
class HostCopy:
    """Copies a few numbers to the host. Only reading them waits for the device.

    Args:
        numbers: The numbers, one-dimensional, on any device.
        driver: Makes the copy.
    """

    def __init__(self, numbers: Tensor, driver: Driver) -> None:
        numbers = numbers.detach()
        self._done: Event | None = None
        device = driver.where(numbers)
        if device is None:
            # Without events nothing tells when a copy has arrived, so it is made when the numbers are read.
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
        """Wait until the numbers have arrived, and return them."""
        if self._done is not None:
            self._done.synchronize()
        numbers: list[float] = self._numbers.tolist()
        return numbers


@final
class Device:
    """The operations on the device of a run that the guard needs, except computation.

    Args:
        driver: The operations of the hardware.
        host_memory: Gives the bytes that the processes of this host can still take.
        clock: Gives the time in seconds.
    """

    def __init__(
        self,
        driver: Driver | None = None,
        host_memory: Callable[[], int] = available_host_memory,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.driver = Driver() if driver is None else driver
        self.host_memory = host_memory
        self._clock = clock
        self.pinning = 0.0
        """Seconds spent on allocating pinned memory so far. Allocated memory is used again."""

    def where(self, tensor: Tensor) -> torch.device | None:
        """The device of a tensor, if it works asynchronously to the host; else ``None``."""
        return self.driver.where(tensor)

    def devices(self, values: Iterable[Any]) -> list[torch.device]:
        """The devices of the tensors among some values."""
        found = (self.where(value) for value in values if isinstance(value, Tensor))
        return list(dict.fromkeys(one for one in found if one is not None))

    def read_later(self, numbers: Tensor) -> HostCopy:
        """Send a few numbers to the host without waiting for them."""
        return HostCopy(numbers, self.driver)

    def pinned_like(self, tensor: Tensor) -> Tensor:
        """Host memory like a tensor, pinned if the host has enough. The run waits for copies to other memory."""
        started = self._clock()
        try:
            return self.driver.pinned_like(tensor)
        except RuntimeError:
            return torch.empty_like(tensor, device="cpu", requires_grad=False)
        finally:
            self.pinning += self._clock() - started

    def pinned_alike(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Host memory like each of some tensors, pinned if the host has enough, in few blocks."""
        found: dict[int, Tensor] = {}
        for nbytes, places in host_blocks([tensor.nbytes for tensor in tensors]):
            block = self.pinned_like(torch.empty(nbytes, dtype=torch.uint8, device="meta"))
            for index, start in places.items():
                like = tensors[index]
                # Keep the strides of a tensor without gaps.
                strides = torch.empty_like(like, device="meta").stride()
                part = block[start : start + like.nbytes].view(like.dtype)
                found[index] = part.as_strided(like.shape, strides, part.storage_offset())
        return [found[index] for index in range(len(tensors))]

    def to_host(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Copy tensors of one device to the host after the work of the run so far, without waiting."""
        device = self.where(sources[0])
        assert device is not None
        self.driver.to_host(self.driver.own_stream(device), targets, sources)

    def mark(self, values: Iterable[Any], *, timed: bool = False) -> list[Event]:
        """Record events after the work of the run so far, one for each device that holds some of the values."""
        driver = self.driver
        return [driver.record(driver.own_stream(one), timed=timed) for one in self.devices(values)]

    def timer(self, values: Iterable[Any]) -> DeviceTimer:
        """Start to measure how long the devices of some tensors work."""
        return DeviceTimer(self, list(values))


@final
class DeviceTimer:
    """Measures how long devices work on something, without waiting for them.

    Args:
        device: The device.
        values: Tensors whose devices are measured. Without such a device nothing is measured.
    """

    def __init__(self, device: Device, values: Sequence[Any] = ()) -> None:
        self._device = device
        self._values = values
        self._began = device.mark(values, timed=True)
        self._ended: list[Event] = []

    def stop(self) -> None:
        """Note that the work to be measured has been launched."""
        self._ended = self._device.mark(self._values, timed=True)
        self._values = ()

    def seconds(self) -> float | None:
        """Time of the slowest device; ``None`` if it is not known yet, or nothing was measured."""
        if not self._ended or not all(event.query() for event in self._ended):
            return None
        return max(began.elapsed_time(ended) / 1e3 for began, ended in zip(self._began, self._ended, strict=True))


def pinned_bytes(nbytes: int) -> int:
    """Bytes of pinned memory that torch takes for a block: its allocator rounds each block up to a power of two.

    Example:
        >>> pinned_bytes(0), pinned_bytes(8), pinned_bytes(9)
        (0, 8, 16)
    """
    return 1 << (nbytes - 1).bit_length() if nbytes else 0


def host_blocks(sizes: Sequence[int]) -> list[tuple[int, dict[int, int]]]:
    """Distribute tensors over blocks of pinned memory. Each block is a power of two, so that none is rounded up.

    Args:
        sizes: Bytes of the tensors.

    Returns:
        For each block its bytes, and the tensors in it: index of the tensor, and the byte at which it begins.

    Example:
        >>> [nbytes for nbytes, _ in host_blocks([3 << 20, 3 << 20, 2 << 20])], pinned_bytes(3 << 20)
        ([8388608], 4194304)
    """
    unit = HOST_ALIGNMENT
    left = sorted(((-(-size // unit) * unit, index) for index, size in enumerate(sizes)), reverse=True)
    blocks: list[tuple[int, dict[int, int]]] = []
    while left:
        rest = sum(size for size, _ in left)
        # The largest block that is full. The last block may be partly empty.
        full = 1 << (max(rest, 1).bit_length() - 1)
        wanted = full if full >= LEAST_BLOCK else pinned_bytes(rest)
        nbytes = max(min(wanted, LARGEST_BLOCK), pinned_bytes(left[0][0]))
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
    """The random generator of modules on a device; ``None`` if they use that of the host."""
    if device.type != "cuda":
        return None
    generator: torch.Generator = torch.cuda.default_generators[device.index or 0]
    return generator
