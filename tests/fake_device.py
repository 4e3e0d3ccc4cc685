"""A device on the CPU that does its work as late as it may, for the tests of all that works beside the run.

The run's own stream computes at once, since its work goes on in order. What it copies to the host lands later, and a
side stream does everything later: when somebody waits for it, or when the test says so.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_nanguard.state.device import Device, DeviceMemory

GiB = 1 << 30
When = Literal["late", "at once", "random"]
ROOMY = DeviceMemory(total=80 * GiB, free=70 * GiB, cached=10 * GiB, peak=1 * GiB)


class FakeStream:
    """A queue of work; ``number`` orders the work of all streams."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.queue: list[tuple[int, Callable[[], None]]] = []

    def run(self, upto: int | None = None) -> None:
        while self.queue and (upto is None or self.queue[0][0] <= upto):
            self.queue.pop(0)[1]()


class FakeEvent:
    """A point in a queue, which comes about after it was asked for a few times."""

    def __init__(self, stream: FakeStream, at: int, patience: int) -> None:
        self.stream, self.at, self.patience = stream, at, patience
        self.milliseconds = 0.0

    def query(self) -> bool:
        if self.patience > 0 and any(number <= self.at for number, _ in self.stream.queue):
            self.patience -= 1
            return False
        self.stream.run(self.at)
        return True

    def synchronize(self) -> None:
        self.stream.run(self.at)

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.milliseconds - self.milliseconds


class FakeDriver:
    """The driver of the fake device.

    Args:
        when: When a stream does what it was given: as late as it may, at once, or at random moments.
        seed: Draws the moments.
        memory: Memory of each device; a test may change it.
        devices: Number of devices; tensors lie on the first one unless :meth:`put` says otherwise.
        pins: Whether there is pinned memory.
    """

    def __init__(
        self, when: When = "late", seed: int = 0, memory: DeviceMemory = ROOMY, devices: int = 1, pins: bool = True
    ) -> None:
        self.when, self.pins = when, pins
        self.memories = {torch.device("cuda", index): memory for index in range(devices)}
        self.pinned: list[int] = []
        self.released = 0
        self._draw = random.Random(seed)
        self._number = 0
        self._host: set[int] = set()
        self._placed: dict[int, torch.device] = {}
        self._own = {device: FakeStream(f"own {device}") for device in self.memories}
        self._side = {device: FakeStream(f"side {device}") for device in self.memories}

    # ------------------------------------------------------------------------------------------------ for tests

    def put(self, tensor: Tensor, index: int | None) -> None:
        """Say where a tensor lies; ``None`` for the host."""
        address = tensor.untyped_storage().data_ptr()
        if index is None:
            self._mark_host(tensor)
        else:
            self._placed[address] = torch.device("cuda", index)

    def tick(self) -> None:
        """Time passes: at random moments some of the work is done."""
        if self.when == "at once":
            self.finish()
        elif self.when == "random":
            for stream in (*self._own.values(), *self._side.values()):
                for _ in range(self._draw.choice((0, 0, 0, 1, 2, 5, 50))):
                    if stream.queue:
                        stream.queue.pop(0)[1]()

    def finish(self) -> int:
        """All streams do what they were given; gives how much that was."""
        streams = (*self._own.values(), *self._side.values())
        count = sum(len(stream.queue) for stream in streams)
        for stream in streams:
            stream.run()
        return count

    # ------------------------------------------------------------------------------------------------ the driver

    def where(self, tensor: Tensor) -> torch.device | None:
        address = tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
        if not address or address in self._host:
            return None
        return self._placed.get(address, next(iter(self.memories)))

    def own_stream(self, device: torch.device) -> FakeStream:
        return self._own[device]

    def side_stream(self, device: torch.device) -> FakeStream:
        return self._side[device]

    def launch(self, stream: FakeStream, work: Callable[[], None]) -> None:
        if stream.name.startswith("own"):
            work()
        else:
            self._give(stream, work)

    def to_host(self, stream: FakeStream, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        for target in targets:
            assert target.untyped_storage().data_ptr() in self._host, "only host memory is copied to"
        own = stream.name.startswith("own")
        for target, source in zip(targets, sources, strict=True):
            value = source.detach().clone() if own else source.detach()
            self._give(stream, lambda target=target, value=value: _write(target, value))  # type: ignore[misc]

    def record(self, stream: FakeStream, *, timed: bool = False) -> FakeEvent:
        return FakeEvent(stream, self._number, self._draw.randrange(4) if self.when == "random" else 3)

    def wait(self, stream: FakeStream, event: Any) -> None:
        if stream.name.startswith("own"):
            event.stream.run(event.at)
        else:  # what the other stream has computed is there; what it sends to the host lands in order
            self._give(stream, lambda: event.stream.run(event.at))

    def pinned_like(self, tensor: Tensor) -> Tensor:
        if not self.pins:
            raise RuntimeError("CUDA error: out of memory (pinned)")
        made = torch.empty_like(tensor, requires_grad=False)
        made.view(-1).view(torch.uint8).fill_(0xAB) if made.is_contiguous() else made.zero_()
        self._mark_host(made)
        self.pinned.append(made.nbytes)
        return made

    def memory(self, device: torch.device) -> DeviceMemory:
        return self.memories[device]

    def release(self) -> None:
        self.released += 1

    def _give(self, stream: FakeStream, work: Callable[[], None]) -> None:
        self._number += 1
        stream.queue.append((self._number, work))
        self.tick()

    def _mark_host(self, tensor: Tensor) -> None:
        address = tensor.untyped_storage().data_ptr()
        self._host.add(address)
        weakref.finalize(tensor, self._host.discard, address)


def _write(target: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        target.copy_(value)


def fake_device(when: When = "late", *, host: int = 512 * GiB, **options: Any) -> tuple[Device, FakeDriver]:
    """A device with a fake driver, and the driver."""
    driver = FakeDriver(when, **options)
    return Device(driver, lambda: host), driver
