"""Restores plain attributes of modules, data sets and objects after the user's code was run again."""

from __future__ import annotations

import copy
import io
import random
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, lru_cache, partial
from operator import is_
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import Dataset

from lightning_nanguard.measure.tensors import is_strided
from lightning_nanguard.thresholds.batches import RepeatedStepsThresholds

CONTAINERS = (list, dict, set, deque, bytearray, defaultdict, OrderedDict, Counter)
"""Plain containers. Subclasses are not among them, because they may do more."""

MISSING: Any = object()
"""Stands for a missing attribute."""

OWN = frozenset(vars(nn.Module()))
"""What torch keeps in every module: parameters, buffers, hooks. The code that copies tensors restores these."""

PLAIN = (bool, int, float, complex, str, bytes, type(None))
"""Values that cannot be changed."""

_PLAIN, _CONTAINERS, _LISTED = frozenset(PLAIN), frozenset(CONTAINERS), frozenset((*CONTAINERS, tuple))
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_NO_OBJECTS = (types.ModuleType, types.FunctionType, types.MethodType, type, Tensor)
# Objects of these packages belong to the trainer or the learner, or work beside the step. Data sets are checked all the
# same, because one may be a replay buffer.
_FOREIGN = frozenset({"torch", "pytorch_lightning", "lightning", "lightning_fabric", "lightning_nanguard", "logging"})
_BESIDE = frozenset({"_thread", "threading", "queue", "_queue", "multiprocessing", "concurrent", "asyncio"})


def same(value: Any, held: Any) -> bool:
    """Whether a value still has the contents copied by :func:`content`: the same objects, or equal plain values."""
    if isinstance(value, Tensor):
        return bool(value._version == held[0])
    if isinstance(value, np.ndarray):
        return bool(value.shape == held.shape and value.tobytes() == held.tobytes())
    if isinstance(value, _GENERATORS):
        return _same_position(content(value), held)
    if len(value) != len(held):
        return False
    if isinstance(value, dict):
        return all(held.get(key, MISSING) is one for key, one in value.items())
    if isinstance(value, set):
        return bool(value == held)
    return all(one is other or _equal(one, other) for one, other in zip(value, held, strict=True))


def _same_position(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return repr(one) == repr(other)


def _equal(one: Any, other: Any) -> bool:
    return isinstance(one, PLAIN) and type(one) is type(other) and bool(one == other)


def refill(container: Any, held: Any) -> None:
    """Restore the contents of a container, which stays the same object."""
    container.clear()
    (container.update if isinstance(container, (dict, set)) else container.extend)(held)


@final
class LearnedMemory:
    """Addresses of the parameters and buffers of a module, collected when first asked for.

    Attributes may refer to the same memory.

    Args:
        owner: The module. Other objects have no such memory.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner

    def __contains__(self, address: object) -> bool:
        return address in self._addresses

    @cached_property
    def _addresses(self) -> frozenset[int]:
        if not isinstance(self._owner, nn.Module):
            return frozenset()
        tensors = (*self._owner.parameters(), *self._owner.buffers())
        return frozenset(one.untyped_storage().data_ptr() for one in tensors if not is_lazy(one) and is_strided(one))


def is_content(value: Any, copied_bytes: int, learned: Container[int] = ()) -> bool:
    """Whether a step may change the contents of a value in place, so that these have to be copied.

    Args:
        value: The value of an attribute, or of an item in a container.
        copied_bytes: Bytes up to which tensors and arrays are copied.
        learned: Addresses of memory that is not copied; see :class:`LearnedMemory`.
    """
    kind = type(value)
    if kind in _PLAIN:
        return False
    if kind in _CONTAINERS:
        return True
    if isinstance(value, Tensor):
        usable = is_strided(value) and not value.is_inference() and value.nbytes <= copied_bytes
        return usable and value.untyped_storage().data_ptr() not in learned
    if kind is np.ndarray:
        return bool(value.flags.writeable) and value.nbytes <= copied_bytes
    return isinstance(value, _GENERATORS)


def content(value: Any) -> Any:
    """A copy of the contents of a value, for :func:`give_back`."""
    if isinstance(value, Tensor):
        return value._version, value.detach().clone()
    if isinstance(value, np.random.Generator):
        return copy.deepcopy(value.bit_generator.state)
    if isinstance(value, (torch.Generator, np.random.RandomState)):
        return value.get_state()
    return value.getstate() if isinstance(value, random.Random) else copy.copy(value)


def give_back(value: Any, held: Any) -> None:
    """Restore the contents that :func:`content` has copied."""
    if isinstance(value, Tensor):
        _, numbers = held
        if value.shape == numbers.shape:
            # Write through ``data``, because a step may have done so too, and autograd does not notice it.
            value.data.copy_(numbers)
    elif isinstance(value, np.ndarray):
        value[...] = held
    elif isinstance(value, np.random.Generator):
        value.bit_generator.state = held
    elif isinstance(value, (torch.Generator, np.random.RandomState)):
        value.set_state(held)
    elif isinstance(value, random.Random):
        value.setstate(held)
    else:
        refill(value, held)


@final
class Reached(NamedTuple):
    """The objects and values that a step can change.

    Attributes:
        owners: The objects with attributes: modules first, then the plain objects that they hold.
        items: Containers, arrays, tensors and generators inside containers.
        streams: Whether there is an iterator, which cannot be restored.
    """

    owners: list[Any]
    items: list[Any]
    streams: bool


def reach(owner: Any, copied_bytes: int, limits: RepeatedStepsThresholds = RepeatedStepsThresholds()) -> Reached:
    """Find what a step can change through an object, a few levels deep and not in long containers.

    Args:
        owner: The object. For a module, also every module in it.
        copied_bytes: Bytes up to which tensors and arrays are copied.
        limits: How deep to look.
    """
    owners, learned = list(_parts(owner)), LearnedMemory(owner)
    items: list[Any] = []
    streams, seen = False, {id(one) for one in owners}
    most = len(owners) + limits.reached_objects
    queue = deque((value, 0, False) for one in owners for value in _values(own_attributes(one).values()))
    while queue and len(seen) < most:
        value, level, is_item = queue.popleft()
        if isinstance(value, PLAIN) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):  # leads nowhere, and there may be many
            items += [value] if is_item and is_content(value, copied_bytes, learned) else []
            continue
        streams |= isinstance(value, Iterator) and not isinstance(value, io.IOBase)
        if is_item and is_content(value, copied_bytes, learned):
            items.append(value)
        inner, within = _items(value, limits.copied_items), True
        if not inner and _is_plain_object(value):
            owners += _parts(value)
            inner, within = list(own_attributes(value).values()), False
        if level < limits.depth:
            queue.extend((one, level + 1, within) for one in _values(inner))
    return Reached(owners, items, streams)


def _parts(owner: Any) -> Iterator[Any]:
    yield from owner.modules() if isinstance(owner, nn.Module) else (owner,)


def _values(values: Iterable[Any]) -> list[Any]:
    """The values that may be changed, or lead to others. Most attributes are plain numbers, strings and flags."""
    return [value for value in values if type(value) not in _PLAIN]


def _items(value: Any, most: int) -> list[Any]:
    if type(value) not in _LISTED or len(value) > most:
        return []
    return list(value.values() if isinstance(value, dict) else value)


def own_attributes(owner: Any) -> Mapping[str, Any]:
    """The attributes of an object. For a module, only those that are not torch's own."""
    attributes = getattr(owner, "__dict__", None)
    if not isinstance(attributes, dict):
        return {}
    skipped = OWN if isinstance(owner, nn.Module) else ()
    # Copy first: another thread may add an attribute meanwhile.
    return {name: value for name, value in attributes.copy().items() if name not in skipped}


def _is_plain_object(value: Any) -> bool:
    try:
        return _may_be_put_back(value)
    except Exception:  # `isinstance` may run code of the user
        return False


def _may_be_put_back(value: Any) -> bool:
    if isinstance(value, (*_NO_OBJECTS, Iterator)) or not isinstance(getattr(value, "__dict__", None), dict):
        return False
    kind: Any = type(value)
    if not _FOREIGN.isdisjoint(_roots(kind)) and not isinstance(value, (nn.Module, Dataset)):
        return False
    kinds = {type(one) for one in (value, *vars(value).copy().values())} - _PLAIN
    return _BESIDE.isdisjoint(map(_root, kinds))


@lru_cache(maxsize=1024)
def _roots(kind: type) -> frozenset[str]:
    return frozenset(map(_root, kind.__mro__))


def _root(kind: type) -> str:
    return str(kind.__module__).split(".")[0]


@contextmanager
def attributes_kept(*owners: Any, limits: RepeatedStepsThresholds = RepeatedStepsThresholds()) -> Iterator[None]:
    """Restore the attributes of some objects at the end: counters, lists that grow, random generators.

    Attributes are bound to the same objects again. Containers, arrays, small tensors and generators get their contents
    back, also in plain objects that are held, such as a meter of the user. Parameters and buffers are not restored, and
    neither are iterators, which nothing can restore.

    Args:
        owners: The objects. For a module, also every module in it.
        limits: How deep to look, and what is copied.

    Example:
        >>> class Counter:
        ...     seen, outputs = 0, []
        >>> counter = Counter()
        >>> counter.outputs = [1]
        >>> with attributes_kept(counter):
        ...     counter.seen += 1
        ...     counter.outputs.append(2)
        >>> counter.seen, counter.outputs
        (0, [1])
    """
    undo = [step for owner in owners for step in _remember(owner, limits)]
    try:
        yield
    finally:
        for step in undo:
            step()


def _remember(owner: Any, limits: RepeatedStepsThresholds) -> Iterator[Callable[[], None]]:
    left, learned = limits.copied_bytes_rarely, LearnedMemory(owner)
    found = reach(owner, left, limits)
    values = found.items
    for one in found.owners:
        before = own_attributes(one)
        yield partial(_rebind, one, before)
        values += [value for value in _values(before.values()) if is_content(value, left, learned)]
    for value in values:
        size = value.nbytes if isinstance(value, (Tensor, np.ndarray)) else 0
        if size <= left:
            left -= size
            yield partial(give_back, value, content(value))


def _rebind(owner: Any, before: Mapping[str, Any]) -> None:
    now = own_attributes(owner)
    if now.keys() == before.keys() and all(map(is_, now.values(), before.values())):
        return
    attributes = getattr(owner, "__dict__", {})
    for name in now:
        if name not in before:
            del attributes[name]
    for name, value in before.items():
        if attributes.get(name, MISSING) is not value:
            attributes[name] = value
