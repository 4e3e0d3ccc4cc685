"""Remembers what the containers of a batch hold, because a step may remove entries from them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from operator import is_
from typing import Any, final

from lightning_nanguard.state.attributes import refill


@final
class BatchContents:
    """What the dictionaries and lists of a batch hold now. A step may remove entries (``batch.pop("labels")``).

    Args:
        batch: The batch.
        depth: Levels of nested containers that are stored.

    Example:
        >>> batch = {"x": 1, "labels": 2}
        >>> contents = BatchContents(batch, depth=2)
        >>> batch.pop("labels"), contents.changed()
        (2, True)
        >>> contents.restore()
        >>> batch
        {'x': 1, 'labels': 2}
    """

    __slots__ = ("_held",)

    def __init__(self, batch: Any, depth: int) -> None:
        self._held = list(_containers(batch, depth))

    def add(self, batch: Any, depth: int) -> None:
        """Remember another batch, too."""
        self._held += _containers(batch, depth)

    def changed(self) -> bool:
        """Whether a container no longer holds the same objects."""
        return not all(_holds_same(container, held) for container, held in self._held)

    def restore(self) -> None:
        """Restore what the containers held. They stay the same objects."""
        for container, held in self._held:
            refill(container, held)

    def now(self) -> BatchContents:
        """What the same containers hold now."""
        made = BatchContents(None, 0)
        made._held = [(container, copy.copy(container)) for container, _ in self._held]
        return made


def _containers(batch: Any, depth: int) -> Iterator[tuple[Any, Any]]:
    if depth == 0:
        return
    if type(batch) in (dict, list):
        yield batch, copy.copy(batch)
    items = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    for item in items:
        if isinstance(item, (dict, list, tuple)):
            yield from _containers(item, depth - 1)


def _holds_same(container: Any, held: Any) -> bool:
    if len(container) != len(held):
        return False
    if isinstance(container, list):
        return all(map(is_, container, held))
    return all(map(is_, container.values(), held.values())) and container.keys() == held.keys()
