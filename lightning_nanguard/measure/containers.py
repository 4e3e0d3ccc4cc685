"""Splits a value into its parts: containers, and objects that keep tensors in attributes or slots.

The first value of a type determines how to split it. This is stored for later values.
"""

from __future__ import annotations

import copy
import datetime as dt
import enum
import logging
import numbers
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

_logger = logging.getLogger("lightning_nanguard")

Parts: TypeAlias = list[tuple[Any, Any]]
"""The parts of a value, each with its name, key or index."""


@dataclass(frozen=True, slots=True)
class _Anatomy:
    """Functions that split values of one type into parts, and make a value from new parts in the same order."""

    take: Callable[[Any], Parts]
    make: Callable[[Any, list[Any]], Any]


LEAVES = (
    int, float, str, bytes, bytearray, numbers.Number, np.generic, type(None), enum.Enum, range, slice, type, PurePath,
    dt.date, dt.time, dt.timedelta, torch.dtype, torch.device, torch.Size, weakref.ReferenceType,
    types.FunctionType, types.BuiltinFunctionType, types.ModuleType,
)  # fmt: skip
"""Types whose values lead to no other value that a batch would keep in memory."""

# Values of these types hold no part of a batch, and could lead to the whole program.
_WHOLE = (
    *LEAVES, Tensor, np.ndarray, types.MethodType, Iterator, torch.Generator,
    nn.Module, Optimizer, Dataset, DataLoader, Sampler,
)  # fmt: skip

_known: dict[type, _Anatomy | None] = {}
_slots_known: dict[type, dict[str, Any]] = {}


def parts_of(value: Any) -> Parts | None:
    """The parts of a value, with their names, keys or indices; ``None`` if the value cannot be split.

    A type that cannot be split is logged once.
    """
    kind = type(value)
    if kind not in _known:
        _known[kind] = _anatomy(kind)
    anatomy = _known[kind]
    if anatomy is None:
        return None
    try:
        return anatomy.take(value)
    except Exception as error:
        _known[kind] = None
        _say_whole(kind, f": {error!r}")
        return None


def remade(value: Any, parts: list[Any]) -> Any:
    """A copy of a value with new parts, in the order of :func:`parts_of`."""
    anatomy = _known[type(value)]
    assert anatomy is not None
    return anatomy.make(value, parts)


def _anatomy(kind: type) -> _Anatomy | None:
    if issubclass(kind, _WHOLE):
        return None
    if issubclass(kind, Mapping):
        return _Anatomy(lambda value: list(value.items()), _make_mapping)
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        # Do not call the constructor: that of a PackedSequence checks its arguments.
        return _Anatomy(_fields, lambda value, parts: value._make(parts))
    if issubclass(kind, (list, tuple, set, frozenset, deque)):
        return _Anatomy(lambda value: list(enumerate(value)), _make_sequence)
    if kind.__dictoffset__ or _slots(kind):
        return _Anatomy(attribute_parts, _make_object)
    _say_whole(kind)
    return None


def _say_whole(kind: type, why: str = "") -> None:
    _logger.info(
        "NaNGuard: cannot look inside values of type %s.%s, so the numbers in them are not checked%s",
        kind.__module__,
        kind.__qualname__,
        why,
    )


def _fields(value: Any) -> Parts:
    return list(zip(value._fields, value, strict=True))


def _make_mapping(value: Any, parts: list[Any]) -> Any:
    keys = list(value)
    if type(value) is not dict:
        try:
            made = copy.copy(value)
            for key, part in zip(keys, parts, strict=True):
                made[key] = part
            return made
        except Exception as error:  # it cannot be written or copied
            _logger.debug("NaNGuard: %s becomes a dict: %r", type(value).__name__, error)
    return dict(zip(keys, parts, strict=True))


def _make_sequence(value: Any, parts: list[Any]) -> Any:
    kind = type(value)
    if isinstance(value, deque):
        return deque(parts, value.maxlen)
    try:
        return kind(parts)
    except Exception:  # the constructor of a subclass may take other arguments
        return next(base for base in (list, tuple, set, frozenset) if isinstance(value, base))(parts)


def attribute_parts(value: Any) -> Parts:
    """The attributes of an object by name, including those in slots."""
    found: Parts = list(getattr(value, "__dict__", {}).items())
    for name, slot in _slots(type(value)).items():
        try:
            found.append((name, slot.__get__(value)))
        except AttributeError:  # not set
            continue
    return found


def _make_object(value: Any, parts: list[Any]) -> Any:
    made = copy.copy(value)
    set_attributes(made, [(name, part) for (name, _), part in zip(attribute_parts(value), parts, strict=True)])
    return made


def set_attributes(value: Any, parts: Parts) -> None:
    """Set the result of :func:`attribute_parts`, without the class's ``__setattr__``: a frozen dataclass forbids it."""
    for name, part in parts:
        object.__setattr__(value, name, part)


def _slots(kind: type) -> dict[str, Any]:
    if kind not in _slots_known:
        # Only slots that Python classes declare. Classes written in C have other members.
        _slots_known[kind] = {
            name: member
            for base in reversed(kind.__mro__)
            if "__slots__" in vars(base)
            for name, member in vars(base).items()
            if isinstance(member, types.MemberDescriptorType)
        }
    return _slots_known[kind]
