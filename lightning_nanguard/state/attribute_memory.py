"""Stores plain attributes of a module (counters, hidden states, lists) before every step, at little cost."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, final

from torch import Tensor, nn
from torchmetrics import Metric

from lightning_nanguard.state.attributes import CONTAINERS, MISSING, OWN, refill
from lightning_nanguard.thresholds.batches import RepeatedStepsThresholds

_DEFAULTS = RepeatedStepsThresholds()
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


@final
class Attributes:
    """The plain attributes of some objects at one moment.

    Attributes are bound again to what they were bound to; lists, dictionaries, sets and deques among them get back what
    they held, one level deep.

    Args:
        modules: The modules, each with the names of its containers.
        copied_items: Items up to which a container is copied; of a longer list only the length is kept.
    """

    __slots__ = ("_contents", "_owners")

    def __init__(self, modules: Iterable[tuple[nn.Module, Sequence[str]]], copied_items: int) -> None:
        self._owners: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._contents: list[tuple[Any, Any]] = []
        for module, names in modules:
            attributes = vars(module)
            self._owners.append((attributes, attributes.copy()))
            for name in names:
                value: Any = attributes.get(name)
                if type(value) in CONTAINERS:
                    held = copy.copy(value) if len(value) <= copied_items else len(value)
                    self._contents.append((value, held))

    def restore(self, *, plain: bool = True) -> None:
        """Put them back.

        Args:
            plain: Whether to put numbers, strings and flags back too, and not only tensors, containers and objects.
        """
        for attributes, before in self._owners:
            for name in [name for name in attributes if name not in before and name not in OWN]:
                if plain or not isinstance(attributes[name], _PLAIN):
                    del attributes[name]
            for name, value in before.items():
                now = attributes.get(name, MISSING)
                kept = not plain and isinstance(now, _PLAIN) and isinstance(value, _PLAIN) and None not in (now, value)
                if name not in OWN and now is not value and not kept:
                    attributes[name] = value
        for value, held in self._contents:
            if isinstance(held, int):
                if isinstance(value, (list, bytearray)):
                    del value[held:]
                continue
            refill(value, held)

    def plain_now(self) -> list[tuple[dict[str, Any], str, Any]]:
        """Numbers, strings and flags with another value by now: the attributes they lie in, name and value."""
        return [
            (attributes, name, value)
            for attributes, before in self._owners
            for name, value in attributes.items()
            if name not in OWN and isinstance(value, _PLAIN) and not _same(value, before.get(name, MISSING))
        ]

    def restore_plain(self) -> None:
        """Put numbers, strings and flags back, and leave tensors, containers and objects as they are."""
        for attributes, before in self._owners:
            for name, value in before.items():
                if name not in OWN and isinstance(value, _PLAIN) and isinstance(attributes.get(name), _PLAIN):
                    attributes[name] = value

    def not_in(self, other: Attributes) -> list[Any]:
        """What is held here, one level deep, and not by the attributes of another moment."""
        known = {id(value) for value in other._held()}
        return [value for value in self._held() if id(value) not in known]

    def _held(self) -> Iterator[Any]:
        for _, before in self._owners:
            yield from (value for name, value in before.items() if name not in OWN)
        for _, held in self._contents:
            if not isinstance(held, int):
                yield from held.values() if isinstance(held, dict) else held

    def changed(self) -> bool:
        """Whether any of them is another by now."""
        return any(
            (name not in OWN and before.get(name, MISSING) is not value)
            for attributes, before in self._owners
            for name, value in attributes.items()
        ) or any(
            len(value) != held if isinstance(held, int) else not _holds_the_same(value, held)
            for value, held in self._contents
        )


def _containers(module: nn.Module) -> list[str]:
    return [name for name, value in vars(module).items() if name not in OWN and type(value) in CONTAINERS]


def _same(value: Any, before: Any) -> bool:
    return value is before or (type(value) is type(before) and bool(value == before))


def _holds_the_same(one: Any, other: Any) -> bool:
    if len(one) != len(other):
        return False
    if isinstance(one, dict):
        return all(other.get(key, MISSING) is value for key, value in one.items())
    if isinstance(one, set):
        return bool(one == other)
    return all(left is right or _same_plain(left, right) for left, right in zip(one, other, strict=True))


def _same_plain(left: Any, right: Any) -> bool:
    return not isinstance(left, Tensor) and isinstance(left, _PLAIN) and left == right


@final
class AttributeMemory:
    """Remembers plain attributes before every step: the root's always, those of modules that were seen to change too.

    Args:
        module: The module trained.
        thresholds: Which steps are checked, and what is copied.

    Example:
        >>> module = nn.Linear(1, 1)
        >>> module.seen = 0
        >>> before = AttributeMemory(module).open(checked=True)
        >>> module.seen += 1
        >>> before.restore()
        >>> module.seen
        0
    """

    def __init__(self, module: nn.Module, thresholds: RepeatedStepsThresholds = _DEFAULTS) -> None:
        self._root = module
        self._limits = thresholds
        self._changing: list[tuple[nn.Module, Sequence[str]]] = [(module, ())]
        self._others: list[tuple[nn.Module, Attributes]] = []

    def now(self) -> Attributes:
        """The attributes as they are now."""
        return Attributes(self._changing, self._limits.copied_items)

    def open(self, *, checked: bool) -> Attributes:
        """Remember the attributes before a step.

        Args:
            checked: Whether this step is looked at for modules whose attributes change.
        """
        if checked:
            self._changing = [(module, _containers(module)) for module, _ in self._changing]
            self._others = list(self._all_others())
        return self.now()

    def close(self) -> None:
        """The step is over: from now on those modules are remembered, too, whose attributes it changed."""
        if self._others:
            self._changing += [(module, _containers(module)) for module, before in self._others if before.changed()]
            self._others = []

    def _all_others(self) -> Iterator[tuple[nn.Module, Attributes]]:
        known = {id(module) for module, _ in self._changing}
        for module in self._root.modules():
            # The states of metrics are attributes that are written in place: BatchUndo copies them.
            if id(module) not in known and not isinstance(module, Metric):
                yield module, Attributes([(module, _containers(module))], self._limits.copied_items)
