"""Converts a batch of an incident to JSON and named tensors and back, without pickle.

An incident may come from somebody else, and must not run code. So a class that it names is never imported, but only
looked up among the imported modules. Of Python's own classes only containers are made. A constructor gets no arguments
except the items of a container.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from lightning_nanguard.measure.containers import Parts, attribute_parts, parts_of, set_attributes
from lightning_nanguard.measure.tensors import local

NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
"""Numbers that JSON does not know, by their names."""
_BY_ROWS = (torch.sparse_csr, torch.sparse_bsr)
_BY_COLUMNS = (torch.sparse_csc, torch.sparse_bsc)
_OF_PYTHON = (set, frozenset, deque, OrderedDict, defaultdict, Counter, UserDict, UserList, SimpleNamespace)


def take_apart(batch: Any, name: str, tensors: dict[str, Tensor], missing: list[str]) -> dict[str, Any]:
    """Convert a batch to a structure that JSON can store; :func:`put_together` is the inverse.

    Args:
        batch: The batch.
        name: Prefix of the names of its tensors.
        tensors: Its tensors are added here, by name.
        missing: The places of objects that cannot be stored are added here.
    """
    return _Taker(tensors, missing).take(batch, name)


def put_together(structure: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """Make the batch again from its structure.

    Raises:
        ValueError: If one of its classes is not imported, or cannot be made.
    """
    return _Maker(tensors).make(structure)


@final
class _Taker:
    """Converts one batch to its structure."""

    def __init__(self, tensors: dict[str, Tensor], missing: list[str]) -> None:
        self._tensors = tensors
        self._missing = missing
        # Number of each object met so far. Objects are kept, because Python reuses the id of an object that is freed.
        self._objects: dict[int, tuple[int, Any]] = {}

    def take(self, value: Any, name: str) -> dict[str, Any]:
        structure = _whole(value, name, self._tensors)
        if structure is not None:
            return structure
        if isinstance(value, weakref.ReferenceType) and id(value()) in self._objects:
            return {"weak": self._objects[id(value())][0]}
        if id(value) in self._objects:
            return {"same": self._objects[id(value)][0]}
        kind, parts = type(value), None if isinstance(value, Tensor) else parts_of(value)
        home = f"{kind.__module__}:{kind.__qualname__}"
        plain = kind in (dict, list, tuple)
        if parts is None or not (plain or _class(home) is kind):
            self._missing.append(f"{name} ({home.replace(':', '.')})")
            return {"value": None}
        if kind in (list, tuple):
            return {kind.__name__: [self.take(part, f"{name}/{key}") for key, part in parts]}
        if plain:
            return {"dict": self._pairs(parts, name)}
        self._objects[id(value)] = len(self._objects), value
        how = _how(kind)
        return {"object": [home, how, self._pairs(attribute_parts(value) if how == "attributes" else parts, name)]}

    def _pairs(self, parts: Parts, name: str) -> list[Any]:
        # JSON can store these keys in a list. Other keys have a structure of their own.
        return [
            [key if isinstance(key, (str, int)) else self.take(key, f"{name}/key"), self.take(part, f"{name}/{key}")]
            for key, part in parts
        ]


@final
class _Maker:
    """Makes one batch from its structure."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._objects: list[Any] = []

    def make(self, structure: Mapping[str, Any]) -> Any:
        ((kind, content),) = structure.items()
        match kind:
            case "tensor":
                return self._tensors[content]
            case "array":
                return self._tensors[content].numpy()
            case "number":
                return NON_FINITE[content]
            case "dict":
                return dict(self._pairs(content))
            case "list" | "tuple":
                items = [self.make(item) for item in content]
                return tuple(items) if kind == "tuple" else items
            case "object":
                return self._object(*content)
            case "same":
                return self._objects[content]
            case "weak":
                return weakref.ref(self._objects[content])
            case "sparse" | "compressed" | "nested":
                return _odd_tensor(kind, content, self._tensors)
        return content

    def _pairs(self, pairs: list[Any]) -> Parts:
        return [(self.make(key) if isinstance(key, dict) else key, self.make(item)) for key, item in pairs]

    def _object(self, home: str, how: str, pairs: list[Any]) -> Any:
        kind, number = _class(home), len(self._objects)
        if kind is None or how != _how(kind):
            raise ValueError(
                f"The batch holds a {home}, which is not imported. For safety, classes that an incident names are "
                "never imported. Name a --module whose file imports it."
            )
        self._objects.append(None)
        try:
            # Made without the constructor, whose arguments are not known. Its attributes may refer back to it.
            made = self._objects[number] = kind.__new__(kind) if how == "attributes" else None
            parts = self._pairs(pairs)
            if how == "attributes":
                set_attributes(made, parts)
            else:
                made = self._objects[number] = _filled(kind, how, parts)
        except Exception as error:
            raise ValueError(f"The batch holds a {home}, which could not be built again: {error}") from error
        return made


def _filled(kind: Any, how: str, parts: Parts) -> Any:
    if how == "named":
        return kind._make([item for _, item in parts])
    if how == "items":
        return kind([item for _, item in parts])
    made = kind()
    for key, item in parts:
        made[key] = item
    return made


def _whole(value: Any, name: str, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    if isinstance(value, Tensor):
        return _tensor(local(value).detach(), name, tensors)
    if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.number):
        tensors[name] = torch.from_numpy(np.array(value))
        return {"array": name}
    if value is None or type(value) in (bool, int, str):
        return {"value": value}
    if isinstance(value, float):
        return {"value": float(value)} if math.isfinite(value) else {"number": str(float(value))}
    return None


def _tensor(tensor: Tensor, name: str, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    def kept(**parts: Tensor) -> list[str]:
        tensors.update({f"{name}/{part}": value for part, value in parts.items()})
        return [f"{name}/{part}" for part in parts]

    if tensor.is_nested:
        names = kept(**{str(number): part for number, part in enumerate(tensor.unbind())})
        return {"nested": [str(tensor.layout), names]}
    if type(tensor) is not Tensor or tensor.is_quantized or tensor.is_meta:
        return None
    if tensor.layout == torch.strided:
        tensors[name] = tensor
        return {"tensor": name}
    if tensor.is_sparse:
        entries = tensor.coalesce()
        return {"sparse": [list(tensor.shape), kept(indices=entries.indices(), values=entries.values())]}
    if tensor.layout in _BY_ROWS + _BY_COLUMNS:
        by_rows = tensor.layout in _BY_ROWS
        lines = tensor.crow_indices() if by_rows else tensor.ccol_indices()
        places = tensor.col_indices() if by_rows else tensor.row_indices()
        names = kept(lines=lines, places=places, values=tensor.values())
        return {"compressed": [list(tensor.shape), str(tensor.layout), names]}
    return None


def _odd_tensor(kind: str, content: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    parts = [tensors[name] for name in content[-1]]
    if kind == "nested":
        return torch.nested.nested_tensor(parts, layout=_layout(content[0]))
    if kind == "sparse":
        indices, values = parts
        return torch.sparse_coo_tensor(indices, values, content[0], check_invariants=True, is_coalesced=True)
    lines, places, values = parts
    return torch.sparse_compressed_tensor(
        lines, places, values, content[0], layout=_layout(content[1]), check_invariants=True
    )


def _layout(name: str) -> torch.layout:
    layout = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(layout, torch.layout):
        raise ValueError(f"there is no layout {name!r} of tensors.")
    return layout


def _how(kind: type[Any]) -> str:
    """How to make an object again: from items with keys, from items in order, or from attributes."""
    if issubclass(kind, dict):
        return "mapping"
    if hasattr(kind, "_fields") and issubclass(kind, tuple):
        return "named"
    return "items" if issubclass(kind, (list, tuple, set, frozenset, deque)) else "attributes"


def _class(home: str) -> Any:
    """The class of that name; ``None`` if it is not imported or must not be made."""
    package, _, name = home.partition(":")
    found: Any = sys.modules.get(package)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type) or hasattr(found, "__del__"):
        return None
    of_python = found.__module__.partition(".")[0] in sys.stdlib_module_names
    return None if of_python and found not in _OF_PYTHON else found
