"""The newest batches: micro-batches to be run again as they were, and healthy ones to try learning rates on."""

from __future__ import annotations

from collections import deque
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from lightning_nanguard.measure.batches import largest_magnitudes, nested_tensors
from lightning_nanguard.measure.tensors import size
from lightning_nanguard.thresholds.batches import BatchesThresholds

_DEFAULTS = BatchesThresholds()


@final
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
    """Keeps references to the newest batches, for whoever runs them again or compares others with them.

    The micro-batches of the last updates are kept with the random state each began with, so that one can be run again
    as it was. Of the batches that turned out healthy the newest few are kept longer, without their random state.

    Args:
        device: The device of the run, whose random state is kept beside the CPU's.
        updates: Updates whose micro-batches are kept; 1 for the one at hand.
        updates_small: The same where batches are small; ``updates`` if that is more.
        thresholds: How many batches are kept, and when one is strange.

    Example:
        >>> history = BatchHistory(torch.device("cpu"))
        >>> history.add(update=1, index=0, batch=torch.zeros(2, 3))
        >>> history.accept_update(1)
        >>> [index for _, index in history.healthy]
        [0]
    """

    def __init__(
        self,
        device: torch.device,
        updates: int = 1,
        updates_small: int = 0,
        thresholds: BatchesThresholds = _DEFAULTS,
    ) -> None:
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[device.index or 0])
        self._states = [generator.get_state for generator in self._generators]
        self._limits = thresholds.micro_batches
        self._healthy_limits = thresholds.healthy
        self._updates = updates
        self._updates_small = max(updates_small, updates)
        # What a MicroBatch is made of; one is made only where it is asked for, since this runs in every step.
        self._micros: deque[tuple[int, int, Any, list[Tensor]]] = deque()
        self._taken = 0
        self._random: list[Tensor] = []
        self._drawn = True
        self._healthy: deque[tuple[Any, int]] = deque(maxlen=self._healthy_limits.most)
        self._accepted = 0

    def add(self, update: int, index: int, batch: Any) -> None:
        """Take a micro-batch that is about to be run."""
        micros, updates, limits = self._micros, self._updates, self._limits
        if self._updates_small > updates and (_samples(batch) or limits.small + 1) <= limits.small:
            updates = self._updates_small
        while micros and (micros[0][0] <= update - updates or len(micros) >= updates * limits.per_update):
            micros.popleft()
        micros.append((update, index, batch, self._random_state()))

    def accept(self, batch: Any, index: int) -> None:
        """Keep a batch that turned out healthy, once."""
        healthy, limits = self._healthy, self._healthy_limits
        if healthy and healthy[-1][0] is batch:
            return
        if self._accepted % limits.measured_every == 0:
            room = limits.most_bytes // max(1, sum(map(size, nested_tensors(batch))))
            self._healthy = healthy = deque(healthy, maxlen=min(limits.most, room))
        self._accepted += 1
        healthy.append((batch, index))

    def accept_update(self, update: int) -> None:
        """Keep the newest micro-batch of an update that turned out healthy, where it is still there."""
        for known, index, batch, _ in reversed(self._micros):
            if known <= update:
                self.accept(batch, index)
                return

    @property
    def healthy(self) -> list[tuple[Any, int]]:
        """The newest healthy batches and their indices in the epoch, the newest last."""
        return list(self._healthy)

    def strange(self, batch: Any, *, extreme: bool = False) -> bool | None:
        """Whether a tensor of ``batch`` reaches far beyond what it reaches in any of the healthy batches.

        ``None`` where too few healthy batches have the same structure to compare with. Reads from the device.

        Args:
            batch: The batch.
            extreme: Whether to ask if it is out of all proportion to them.
        """
        limits, mine = self._healthy_limits, largest_magnitudes(batch)
        others = [one for kept, _ in self._healthy if len(one := largest_magnitudes(kept)) == len(mine)]
        if len(others) < limits.least_compared or not mine:
            return None
        factor = limits.extreme_factor if extreme else limits.strange_factor
        return any(
            not one <= factor * max(before) for one, *before in zip(mine, *others, strict=True) if max(before) > 0
        )

    def of(self, update: int) -> list[MicroBatch]:
        """The micro-batches of an update, the newest last; a batch with several updates is found under each."""
        known = max((one[0] for one in self._micros if one[0] <= update), default=None)
        return self._made(() if known is None else (known,))

    def newest(self, updates: int = 1) -> list[MicroBatch]:
        """The micro-batches of the last updates."""
        return self._made(sorted({one[0] for one in self._micros})[-updates:])

    def clear(self) -> None:
        """Let go of the micro-batches of an update that is over, where those of no earlier update are needed."""
        if self._updates == 1:
            self._micros.clear()

    def rewind(self, micro: MicroBatch) -> None:
        """Put torch's random streams where they were before a micro-batch."""
        for generator, state in zip(self._generators, micro.random, strict=True):
            generator.set_state(state)

    def _made(self, updates: Container[int]) -> list[MicroBatch]:
        return [
            MicroBatch(update, index, batch, tuple(random))
            for update, index, batch, random in self._micros
            if update in updates
        ]

    def _random_state(self) -> list[Tensor]:
        # Where so many micro-batches drew no random number, the next so many are taken to draw none either.
        checks = self._taken % self._limits.random_checked_every == 0
        self._taken += 1
        if not (self._drawn or checks):
            return self._random
        now = [state() for state in self._states]
        if checks:
            self._drawn = len(now) != len(self._random) or not all(map(torch.equal, now, self._random))
            self._random = now
        return now


def _samples(batch: Any) -> int | None:
    dense = (tensor for tensor in nested_tensors(batch) if tensor.layout == torch.strided)
    return next((len(tensor) for tensor in dense if tensor.dim()), None)
