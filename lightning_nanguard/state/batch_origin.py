"""Where a batch came from: its place in the epoch, and the rows of the data set it holds."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

from lightning_nanguard.types import Row


@final
@dataclass(frozen=True, slots=True)
class BatchOrigin:
    """Where a batch came from.

    Attributes:
        position: Number of batches that the loader gave before it since the epoch began. After a resume in mid-epoch it
            differs from Lightning's ``batch_idx``, since the loader begins again.
        epoch: The epoch.
        keys: What the sampler drew for it, one key a sample; ``None`` if there is no sampler over a map-style data
            set, or its batches do not come in its order.
        collated: Whether torch's ``default_collate`` put it together, so that sample ``i`` is that of key ``i``.
        nothing_left: Whether every sample of it is known to be bad, so that nothing of it is to be learned.
    """

    position: int
    epoch: int = 0
    keys: tuple[Any, ...] | None = None
    collated: bool = False
    nothing_left: bool = False

    def rows(self) -> tuple[Row, ...] | None:
        """The rows of the data set, one a sample; ``None`` if they are not known."""
        return None if self.keys is None else tuple(map(row_of, self.keys))


def row_of(key: Any) -> Row:
    """The row that a sampler's key stands for: an integer, else the key in words.

    Example:
        >>> row_of(7), row_of("cat/3.png")
        (7, 'cat/3.png')
    """
    try:
        return operator.index(key)
    except TypeError:
        return str(key)


def without(keys: Iterable[Any], rows: set[Row]) -> list[Any]:
    """The keys of a batch that stand for none of some rows, in their order.

    Example:
        >>> without([3, 1, 4], {1})
        [3, 4]
    """
    return [key for key in keys if row_of(key) not in rows]
