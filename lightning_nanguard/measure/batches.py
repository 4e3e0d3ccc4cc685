"""Finds the tensors in a batch of any type."""

from __future__ import annotations

import datetime as dt
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_nanguard.measure.containers import LEAVES, parts_of, remade
from lightning_nanguard.measure.tensors import dense_values, size
from lightning_nanguard.thresholds.fixed import DEEPEST_PART

_LEAVES = (*LEAVES, dt.tzinfo)


def largest_magnitudes(batch: Any) -> list[float]:
    """Largest absolute value of every floating-point tensor in a batch, without NaN. Reads from the device."""
    dense = [dense_values(tensor) for tensor in floating_tensors(batch)]
    return [float(values.abs().nan_to_num(0.0, math.inf).max()) for values in dense if values.numel() > 0]


def floating_tensors(batch: Any) -> Iterator[Tensor]:
    """Every floating-point tensor in a batch."""
    return (tensor for tensor in nested_tensors(batch) if tensor.is_floating_point() or tensor.is_complex())


def nested_tensors(batch: Any) -> Iterator[Tensor]:
    """Every tensor in a batch."""
    if isinstance(batch, Tensor):
        yield batch
    else:
        yield from (tensor for _, tensor in named_tensors(batch))


def named_tensors(batch: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a batch with its path: ``"0"``, ``"x"``, ``"graph.nodes"``. Float arrays of NumPy become tensors.

    A value with several paths is given once.

    Args:
        batch: The batch.
    """
    used: set[str] = set()
    for path, tensor in _walk(batch, (), {}, DEEPEST_PART):
        # Leave out the names of private attributes: the names inside them are enough.
        short = [part for part in path[:-1] if not part.startswith("_")]
        name = ".".join([*short, *path[-1:]]) or "0"
        name = ".".join(path) if name in used else name
        used.add(name)
        yield name, tensor


def _walk(
    value: Any, path: tuple[str, ...], seen: dict[int, Any], depth: int
) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, np.ndarray):
        yield from ((path, tensor) for tensor in _floating_array(value))
    elif depth and id(value) not in seen and (parts := parts_of(value)):
        seen[id(value)] = value  # stored, or another value might get the same identity
        for name, part in parts:
            yield from _walk(part, (*path, str(name)), seen, depth - 1)


def _floating_array(array: np.ndarray[Any, Any]) -> Iterator[Tensor]:
    if np.issubdtype(array.dtype, np.inexact):
        try:
            yield torch.from_numpy(np.array(array))  # a copy: the original may not be writable
        except TypeError:  # torch does not have this type
            return


def bytes_of(value: Any, unknown: Callable[[Tensor], bool] = lambda tensor: False) -> int | None:
    """Bytes of the tensors, arrays, texts and numbers that a value keeps in memory, each counted once.

    Args:
        value: The value.
        unknown: Whether a tensor takes more memory than can be measured.

    Returns:
        The bytes; ``None`` if a part of the value has a type that cannot be measured, such as an image.
    """
    total, seen, left = 0, dict[int, Any](), [(value, DEEPEST_PART)]
    while left:
        one, depth = left.pop()
        if id(one) in seen:
            continue
        seen[id(one)] = one
        if isinstance(one, Tensor):
            if unknown(one):
                return None
            total += size(one)
        elif isinstance(one, _LEAVES):
            total += sys.getsizeof(one)
        elif isinstance(one, np.ndarray) and not one.dtype.hasobject:
            total += one.nbytes
        elif not depth or (parts := parts_of(one)) is None:
            return None
        else:
            left += [(part, depth - 1) for _, part in parts]
    return total


def mapped(
    batch: Any,
    function: Callable[[Any], Any],
    kind: type = Tensor,
) -> Any:
    """A copy of the batch in which ``function`` has replaced every tensor.

    Values without tensors are the same objects as before. All others are copies.

    Args:
        batch: The batch.
        function: Returns the replacement of a tensor.
        kind: The type of the values to replace; by default tensors.
    """
    made: dict[int, Any] = {}

    def of(value: Any, depth: int) -> Any:
        if isinstance(value, kind):
            return function(value)
        if id(value) not in made and depth and (parts := parts_of(value)):
            made[id(value)] = value  # needed if it contains itself
            new = [of(part, depth - 1) for _, part in parts]
            if any(one is not part for one, (_, part) in zip(new, parts, strict=True)):
                made[id(value)] = remade(value, new)
        return made.get(id(value), value)

    return of(batch, DEEPEST_PART)
