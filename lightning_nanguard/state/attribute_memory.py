"""Stores plain attributes of a module (counters, hidden states, lists) before every step, at a low cost.

Numbers among them that hooks around a bad step made NaN are restored, too.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Container, Iterable, Iterator
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_nanguard.measure.tensors import is_strided
from lightning_nanguard.state.attributes import (
    CONTAINERS,
    MISSING,
    OWN,
    PLAIN,
    LearnedMemory,
    Reached,
    content,
    give_back,
    is_content,
    own_attributes,
    reach,
    same,
)
from lightning_nanguard.thresholds.batches import RepeatedStepsThresholds


@final
class Attributes:
    """The plain attributes of some objects at one moment.

    A restore binds the attributes to the same objects again. It also restores the contents of containers, arrays,
    tensors and generators among them.

    Args:
        owners: The objects, each with the names of the attributes whose contents are copied.
        items: Further values whose contents are copied.
        limits: What is copied. Of a list that is too long only the length is stored.
        learned: The memory of parameters and buffers, which are not copied here.
    """

    __slots__ = ("_contents", "_owners")

    def __init__(
        self,
        owners: Iterable[tuple[Any, Iterable[str]]],
        items: Iterable[Any] = (),
        limits: RepeatedStepsThresholds = RepeatedStepsThresholds(),
        learned: Container[int] = (),
    ) -> None:
        self._owners: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._contents: list[tuple[Any, Any]] = []
        for owner, names in owners:
            attributes = vars(owner)
            self._owners.append((attributes, attributes.copy()))
            for name in names:
                self._copy(attributes.get(name), limits, learned)
        for item in items:
            self._copy(item, limits, learned)

    def _copy(self, value: Any, limits: RepeatedStepsThresholds, learned: Container[int]) -> None:
        if type(value) in CONTAINERS and len(value) > limits.copied_items:
            self._contents.append((value, len(value)))
        elif is_content(value, limits.copied_bytes, learned):
            self._contents.append((value, content(value)))

    def restore(self, *, plain: bool = True) -> None:
        """Restore the attributes.

        Args:
            plain: Whether to restore numbers, strings and flags too, and not only tensors, containers and objects.
        """
        for attributes, before in self._owners:
            for name in [name for name in attributes if name not in before and name not in OWN]:
                if plain or not _counts(attributes[name]):
                    del attributes[name]
            for name, value in before.items():
                now = attributes.get(name, MISSING)
                kept = not plain and _counts(now) and _counts(value) and None not in (now, value)
                if name not in OWN and now is not value and not kept:
                    attributes[name] = value
        for value, held in self._contents:
            if isinstance(held, int):
                _shorten(value, held)
                continue
            give_back(value, held)

    def bound(self, kinds: Collection[type]) -> list[tuple[dict[str, Any], str, Any]]:
        """The attributes bound to values of some classes: the dictionary that holds each, its name and its value."""
        return [
            (attributes, name, value)
            for attributes, before in self._owners
            for name, value in before.items()
            if type(value) in kinds and name not in OWN
        ]

    def plain_now(self) -> list[tuple[dict[str, Any], str, Any]]:
        """The numbers, strings and flags that have changed since: the dictionary of each, its name and its value.

        A number that is not finite is left out, because the step may have made it so.
        """
        return [
            (attributes, name, value)
            for attributes, before in self._owners
            for name, value in attributes.items()
            if name not in OWN and _counts(value) and not _same(value, before.get(name, MISSING))
        ]

    def restore_plain(self) -> None:
        """Restore numbers, strings and flags, but not tensors, containers and objects."""
        for attributes, before in self._owners:
            for name, value in before.items():
                if name not in OWN and isinstance(value, PLAIN) and isinstance(attributes.get(name), PLAIN):
                    attributes[name] = value

    def not_in(self, other: Attributes) -> list[Any]:
        """The values stored here, one level deep, that are not among the attributes of another moment.

        Owners and containers that only one of the two moments has are left out, because their values need not be new.
        """
        known = {id(value) for _, held in other._holders() for value in held}
        both = {owner for owner, _ in other._holders()}
        return [one for owner, held in self._holders() if owner in both for one in held if id(one) not in known]

    def _holders(self) -> Iterator[tuple[int, list[Any]]]:
        for attributes, before in self._owners:
            yield id(attributes), [value for name, value in before.items() if name not in OWN]
        for value, held in self._contents:
            if type(value) in CONTAINERS and not isinstance(held, int):
                yield id(value), list(held.values() if isinstance(held, dict) else held)

    def changed(self) -> set[int]:
        """Identities of the values with changed contents, and of the attribute dictionaries with changed values."""
        bound = {
            id(attributes)
            for attributes, before in self._owners
            if any(name not in OWN and before.get(name, MISSING) is not one for name, one in attributes.copy().items())
        }
        return bound | {
            id(value)
            for value, held in self._contents
            if (len(value) != held if isinstance(held, int) else not same(value, held))
        }


def _shorten(container: Any, length: int) -> None:
    """Remove the items that were added since. Items that a full deque has dropped are lost."""
    if isinstance(container, (list, bytearray)):
        del container[length:]
    elif isinstance(container, (deque, dict)):
        while len(container) > length:
            container.pop() if isinstance(container, deque) else container.popitem()


def _counts(value: Any) -> bool:
    """Whether a value may belong to the clock: a number, a string or a flag, but not one that a bad batch makes."""
    return isinstance(value, PLAIN) and not (isinstance(value, float) and not math.isfinite(value))


def _same(value: Any, before: Any) -> bool:
    return value is before or (type(value) is type(before) and bool(value == before))


@final
class AttributeMemory:
    """Stores plain attributes before every step: those of the root, and of modules that were seen to change theirs.

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

    def __init__(self, module: nn.Module, thresholds: RepeatedStepsThresholds = RepeatedStepsThresholds()) -> None:
        self._root = module
        self._limits = thresholds
        # The objects that steps were seen to change, each with the names of the values to copy; and values elsewhere.
        self._changing: list[tuple[Any, set[str]]] = [(module, set())]
        self._items: list[Any] = []
        self._learned: Container[int] = ()
        self._checked: tuple[Reached, Attributes] | None = None

    def now(self) -> Attributes:
        """The attributes as they are now."""
        return Attributes(self._changing, self._items, self._limits, self._learned)

    def open(self, *, checked: bool) -> Attributes:
        """Store the attributes before a step.

        Args:
            checked: Whether to find out which objects this step changes.
        """
        if not checked:
            return self.now()
        found = reach(self._root, self._limits.copied_bytes, self._limits)
        owners = [(one, set(own_attributes(one))) for one in found.owners if not self._is_undone(one)]
        self._learned = LearnedMemory(self._root)
        self._checked = found, Attributes(owners, found.items, self._limits, self._learned)
        return self._checked[1]

    def close(self) -> None:
        """Note the objects whose attributes a checked step changed. From now on they are stored before every step."""
        if self._checked is None:
            return
        (found, before), self._checked = self._checked, None
        changed, known = before.changed(), {id(owner): names for owner, names in self._changing}
        self._changing = []
        for owner in found.owners:
            written = {name for name, value in own_attributes(owner).items() if id(value) in changed}
            if id(owner) in known or written or id(vars(owner)) in changed:
                containers = {name for name, value in own_attributes(owner).items() if type(value) in CONTAINERS}
                self._changing.append((owner, known.get(id(owner), set()) | written | containers))
        kept = changed | {id(one) for one in self._items}
        self._items = [one for one in found.items if id(one) in kept]

    def _is_undone(self, owner: Any) -> bool:
        # Metrics write their states in place, and BatchUndo copies these.
        return isinstance(owner, Metric) and any(owner is one for one in self._root.modules())


_KINDS = frozenset({float, Tensor, np.ndarray})


@final
class AttributeNumbers:
    """Stores the numbers with which the last good step began.

    :class:`Attributes` restores what the step itself changed. This class restores what was changed before it, in
    ``on_after_batch_transfer`` or ``on_train_batch_start``, or after it, in ``on_train_batch_end``. It does not restore
    infinite numbers, because code that looks for a minimum begins with one.

    Args:
        limits: Bytes up to which tensors and arrays are stored.

    Example:
        >>> from types import SimpleNamespace
        >>> module, numbers = SimpleNamespace(mean=0.5), AttributeNumbers()
        >>> numbers.open(Attributes([(module, ())]))
        >>> module.mean = float("nan")
        >>> numbers.open(Attributes([(module, ())]))
        >>> numbers.undo()
        >>> module.mean
        0.5
    """

    def __init__(self, limits: RepeatedStepsThresholds = RepeatedStepsThresholds()) -> None:
        self._limits = limits
        self._good: list[tuple[dict[str, Any], str, Any]] = []
        self._newest: list[tuple[dict[str, Any], str, Any]] = []
        self._undone = False

    def begin(self) -> None:
        """Before a step, restore what was changed since a step that was left out."""
        if self._undone:
            self._put_back()

    def open(self, attributes: Attributes) -> None:
        """Store the numbers with which a step begins.

        Args:
            attributes: The attributes at its beginning.
        """
        if not self._undone:
            self._good = self._newest
        # This runs in every step, so the cheap check of the class comes first.
        bound, most = attributes.bound(_KINDS), self._limits.copied_bytes
        self._newest = [one for one in bound if type(one[2]) is float or _is_small(one[2], most)]
        self._undone = False

    def undo(self) -> None:
        """Restore the numbers, because the step is left out."""
        self._undone = True
        self._put_back()

    def _put_back(self) -> None:
        for attributes, name, value in self._good:
            now = attributes.get(name)
            if now is not value and _has_nan(now) and not _has_nan(value):
                attributes[name] = value


def _is_small(value: Any, copied_bytes: int) -> bool:
    if isinstance(value, Tensor):
        # A value with a graph would keep the activations of its step in memory.
        return value.grad_fn is None and is_strided(value) and value.nbytes <= copied_bytes
    return bool(value.nbytes <= copied_bytes)


def _has_nan(value: Any) -> bool:
    if isinstance(value, Tensor):
        return is_strided(value) and bool(torch.isnan(value.detach()).any())
    if type(value) is np.ndarray:
        return np.issubdtype(value.dtype, np.inexact) and bool(np.isnan(value).any())
    return isinstance(value, float) and value != value
