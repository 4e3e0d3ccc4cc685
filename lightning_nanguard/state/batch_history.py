"""The newest micro-batches, each with the random state it began with, so that one can be run again as it was."""

from __future__ import annotations

from collections import deque
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from lightning_nanguard.diagnosis.batch import samples

SMALL = 4
"""Samples up to which a batch is small."""


# Where so many micro-batches have drawn no random number, the next so many are taken to draw none either: to copy the
# state of torch's generator, 5 KB, is the dearest thing that is done before a batch.
_LOOK_AGAIN = 16


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """One micro-batch.

    Attributes:
        update: Number of the update it belongs to.
        index: Its index in the epoch.
        batch: The batch itself.
        random: torch's random states before it: on CPU, and on the device where that has one.
    """

    update: int
    index: int
    batch: Any
    random: tuple[Tensor, ...]


@final
class BatchHistory:
    """Keeps references to the micro-batches of the last updates.

    Args:
        device: The device of the run, whose random state is kept beside the CPU's.
        updates: Updates kept; 1 for the one at hand.
        most: Micro-batches of one update that are kept, the newest; more would hold memory for nothing.
        small: Updates kept where a batch holds up to four samples, of which eight would say little; ``updates`` if
            that is more.
    """

    def __init__(self, device: torch.device, updates: int = 1, most: int = 8, small: int = 0) -> None:
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[device.index or 0])
        self._states = [generator.get_state for generator in self._generators]
        self._updates = updates
        self._most = most
        self._small = max(small, updates)
        # What a Micro is made of, and only where one is asked for: this runs in every step.
        self._micros: deque[tuple[int, int, Any, list[Tensor]]] = deque()
        self._taken = 0
        self._random: list[Tensor] = []
        self._drawn = True

    def add(self, update: int, index: int, batch: Any) -> None:
        """Take a micro-batch that is about to be run."""
        micros, updates = self._micros, self._updates
        if self._small > updates and (samples(batch) or SMALL + 1) <= SMALL:
            updates = self._small
        while micros and (micros[0][0] <= update - updates or len(micros) >= updates * self._most):
            micros.popleft()
        micros.append((update, index, batch, self._state()))

    def _state(self) -> list[Tensor]:
        looks = self._taken % _LOOK_AGAIN == 0
        self._taken += 1
        if not (self._drawn or looks):
            return self._random
        now = [state() for state in self._states]
        if looks:
            self._drawn = len(now) != len(self._random) or not all(map(torch.equal, now, self._random))
            self._random = now
        return now

    def of(self, update: int) -> list[MicroBatch]:
        """The micro-batches of an update, the newest last; a batch with several updates is found under each."""
        known = max((one[0] for one in self._micros if one[0] <= update), default=None)
        return self._made(() if known is None else (known,))

    def last(self, update: int) -> tuple[Any, int] | None:
        """The newest batch of an update and its index, ``None`` where it is no longer there."""
        return next(((batch, index) for known, index, batch, _ in reversed(self._micros) if known <= update), None)

    def newest(self, updates: int = 1) -> list[MicroBatch]:
        """The micro-batches of the last updates."""
        return self._made(sorted({one[0] for one in self._micros})[-updates:])

    def _made(self, updates: Container[int]) -> list[MicroBatch]:
        return [
            MicroBatch(update, index, batch, tuple(random))
            for update, index, batch, random in self._micros
            if update in updates
        ]

    def clear(self) -> None:
        """Let go of every batch that is not needed once its update is over."""
        if self._updates == 1:
            self._micros.clear()

    def rewind(self, micro: MicroBatch) -> None:
        """Put torch's random streams where they were before a micro-batch."""
        for generator, state in zip(self._generators, micro.random, strict=True):
            generator.set_state(state)
