"""The newest healthy batches: what a rate is rehearsed on, and what a strange batch is told by."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, final

from lightning_nanguard.measure.batches import largest_magnitudes, nested_tensors
from lightning_nanguard.measure.tensors import size

# A few batches choose a rate far better than one (97 % against 91 % of 130 tries), more than four hardly better.
_MOST = 4


_MAX_BYTES = 64 << 20


# Batches of a run are much alike: to measure each would cost more than to keep it.
_MEASURE_EVERY = 16


# How many times the largest number of the batches before makes a batch strange.
_FAR = 100.0


@final
class RecentBatches:
    """References to the newest healthy batches, at most four of them and about 64 MiB.

    Example:
        >>> import torch
        >>> recent = RecentBatches()
        >>> recent.add(torch.zeros(2, 3), 0)
        >>> [index for _, index in recent]
        [0]
    """

    def __init__(self) -> None:
        self._kept: deque[tuple[Any, int]] = deque(maxlen=_MOST)
        self._taken = 0

    def add(self, batch: Any, batch_idx: int) -> None:
        """Take a batch that turned out healthy, once."""
        if self._kept and self._kept[-1][0] is batch:
            return
        if self._taken % _MEASURE_EVERY == 0:
            room = _MAX_BYTES // max(1, sum(map(size, nested_tensors(batch))))
            self._kept = deque(self._kept, maxlen=min(_MOST, room))
        self._taken += 1
        self._kept.append((batch, batch_idx))

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        return iter(list(self._kept))

    def __len__(self) -> int:
        return len(self._kept)

    def strange(self, batch: Any) -> bool | None:
        """Whether a tensor of ``batch`` reaches 100 times as far from zero as in any of the recent batches.

        ``None`` where there are fewer than two to compare with, or none of the same structure. Reads from the device.
        """
        mine = largest_magnitudes(batch)
        others = [one for kept, _ in self._kept if len(one := largest_magnitudes(kept)) == len(mine)]
        if len(others) < 2 or not mine:
            return None
        return any(not one <= _FAR * max(before) for one, *before in zip(mine, *others, strict=True) if max(before) > 0)
