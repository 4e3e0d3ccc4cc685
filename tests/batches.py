"""Batches of many kinds, of the same three samples; module-level classes, so that they are found by name."""

from __future__ import annotations

import weakref
from collections import UserDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.utils.rnn import pack_sequence


@dataclass
class Record:
    x: Tensor
    y: Tensor
    name: str = "text"
    nothing: None = None


@dataclass(frozen=True, slots=True)
class Frozen:
    x: Tensor
    y: Tensor


@dataclass
class Nested:
    first: Frozen
    tags: list[str]


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class Graph:
    """A graph batch: moves itself, and keeps its tensors in a store of its own."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._store = {"x": x, "y": y}
        self.itself = self
        self.parent = weakref.ref(self)

    @property
    def x(self) -> Tensor:
        return self._store["x"]

    @property
    def y(self) -> Tensor:
        return self._store["y"]

    def to(self, *args: Any, **kwargs: Any) -> Graph:
        return self


class Slots:
    __slots__ = ("__hidden", "unset", "x")

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.__hidden = x, y

    @property
    def y(self) -> Tensor:
        return self.__hidden


class Features(UserDict[str, Any]):
    pass


KINDS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "named tuple": Pair,
    "dataclass": Record,
    "frozen": Frozen,
    "nested dataclass": lambda x, y: Nested(Frozen(x, y), ["a", "b"]),
    "object": Graph,
    "slots": Slots,
    "dict": lambda x, y: {"x": x, "y": y, "meta": [None, "text"]},
    "any keys": lambda x, y: {("x", 1): x, 2.5: y, None: "text"},
    "mapping": lambda x, y: Features(x=x, y=y),
    "deque": lambda x, y: deque([x, y]),
}
"""Makes a batch of two tensors."""


def tensors_of(batch: Any) -> tuple[Tensor, Tensor]:
    """Both tensors of a batch, as a ``training_step`` that knows its batches takes them out."""
    match batch:
        case Nested():
            return batch.first.x, batch.first.y
        case Record() | Frozen() | Pair() | Graph() | Slots():
            return batch.x, batch.y
        case dict() | Features():
            return tuple(value for value in batch.values() if isinstance(value, Tensor))  # type: ignore[return-value]
    return tuple(batch)


def packed(x: Tensor) -> Any:
    """The samples as sequences of different lengths, packed."""
    return pack_sequence([row[: 1 + number] for number, row in enumerate(x)], enforce_sorted=False)
