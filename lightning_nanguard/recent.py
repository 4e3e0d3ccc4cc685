"""The newest healthy batches: what a rate is rehearsed on, and what a strange batch is told by."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, final

from lightning_nanguard.measure import largest_magnitudes, nested_tensors, size

# A few batches choose a rate far better than one (97 % against 91 % of 130 tries), more than four hardly better.
_MOST = 4
_MAX_BYTES = 64 << 20
# How many times the largest number of the batches before makes a batch strange.
_FAR = 100.0


@final
class RecentBatches:
    """References to the newest healthy batches, at most four of them and 64 MiB.

    Example:
        >>> import torch
        >>> recent = RecentBatches()
        >>> recent.add(torch.zeros(2, 3), 0)
        >>> [index for _, index in recent]
        [0]
    """

    def __init__(self) -> None:
        self._batches: deque[tuple[Any, int]] = deque(maxlen=_MOST)
        self._sizes: deque[int] = deque(maxlen=_MOST)

    def add(self, batch: Any, batch_idx: int) -> None:
        """Take a batch that turned out healthy."""
        self._batches.append((batch, batch_idx))
        self._sizes.append(sum(map(size, nested_tensors(batch))))
        while sum(self._sizes) > _MAX_BYTES:
            self._batches.popleft()
            self._sizes.popleft()

    def clear(self) -> None:
        """Let go of them."""
        self._batches.clear()
        self._sizes.clear()

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        return iter(tuple(self._batches))

    def __len__(self) -> int:
        return len(self._batches)

    def strange(self, batch: Any) -> bool | None:
        """Whether a tensor of ``batch`` reaches 100 times as far from zero as in any of the recent batches.

        ``None`` where there are fewer than two to compare with, or none of the same structure. Reads from the device.
        """
        mine = largest_magnitudes(batch)
        others = [magnitudes for b, _ in self._batches if len(magnitudes := largest_magnitudes(b)) == len(mine)]
        if len(others) < 2 or not mine:
            return None
        return any(not one <= _FAR * max(before) for one, *before in zip(mine, *others, strict=True) if max(before) > 0)
