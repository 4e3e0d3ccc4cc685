"""Where a batch came from: its position in the epoch, and its rows of the data set."""

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
        position: Number of batches that the loader gave before it in this epoch. After a resume within an epoch it
            differs from Lightning's ``batch_idx``, because the loader begins again.
        epoch: The epoch.
        keys: The keys that the sampler drew for it, one for each sample. ``None`` without a sampler over a map-style
            data set, and if the batches do not come in the order of the sampler.
        collated: Whether torch's ``default_collate`` made it, so that sample ``i`` belongs to key ``i``.
        nothing_left: Whether every sample of it is known to be bad, so that none is left to train on.
    """

    position: int
    epoch: int = 0
    keys: tuple[Any, ...] | None = None
    collated: bool = False
    nothing_left: bool = False


def row_of(key: Any) -> Row:
    """The row for a sampler's key: the key itself if it is an integer, else the key in words.

    Example:
        >>> row_of(7), row_of("cat/3.png")
        (7, 'cat/3.png')
    """
    try:
        return operator.index(key)
    except TypeError:
        return str(key)


def without(keys: Iterable[Any], rows: set[Row]) -> list[Any]:
    """The keys of a batch whose rows are not among ``rows``, in their order.

    Example:
        >>> without([3, 1, 4], {1})
        [3, 4]
    """
    return [key for key in keys if row_of(key) not in rows]
