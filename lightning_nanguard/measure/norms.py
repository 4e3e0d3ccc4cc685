"""Norms of many tensors in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter, methodcaller

import torch
from torch import Tensor

from lightning_nanguard.measure.tensors import WIDER, dense_values, is_at_hand, local, moved_to

_NUMEL = methodcaller("numel")


_DTYPE = attrgetter("dtype")


_UP_TO_FLOAT = {torch.float16, torch.bfloat16, torch.float32}


# On the CPU, from so many tensors on, one of up to so many elements is cheaper to copy behind the others than to be
# read by itself; so many are copied at once.
_MANY = 100


_SMALL = 4096


_AT_ONCE = 1024


def partial_norms(values: list[Tensor]) -> list[Tensor]:
    """2-norms, 0-dim, whose own 2-norm is that over all tensors; fewer than there are tensors where these are small.

    Finite results prove every element finite; the inverse does not hold, since squares overflow.
    """
    norms: list[Tensor] = []
    if len(values) >= _MANY and all(map(is_at_hand, values)):
        sizes = list(map(_NUMEL, values))
        small = [value for value, size in zip(values, sizes, strict=True) if size <= _SMALL]
        values = [value for value, size in zip(values, sizes, strict=True) if size > _SMALL]
        norms = [
            _norm(torch._C._nn.flatten_dense_tensors(small[start : start + _AT_ONCE]))
            for start in range(0, len(small), _AT_ONCE)
        ]
    if len(values) == 1:
        norms.append(_norm(values[0]))
    elif values:
        dtypes = set(map(_DTYPE, values))
        if len(dtypes) == 1 and dtypes.isdisjoint(WIDER):
            norms += torch._foreach_norm(values)
        elif dtypes <= _UP_TO_FLOAT:
            # Half precision overflows at 65,504, which is no unusual norm.
            norms += torch._foreach_norm(values, 2, torch.float32)
        else:
            norms += map(_norm, values)
    return norms


def each_norm(values: list[Tensor], order: float = 2.0) -> list[Tensor]:
    """A norm of each of several dense tensors of one kind, none of them empty; 0-dim."""
    return list(torch._foreach_norm(values, order, WIDER.get(values[0].dtype))) if values else []


def total_norm(norms: Sequence[Tensor]) -> Tensor:
    """2-norm of partial norms, a 0-dim float tensor on the first one's device."""
    first = norms[0]
    if len(norms) > 1:
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        if any(norm.device != first.device or norm.dtype != dtype for norm in norms):
            norms = [moved_to(norm, first.device, dtype) for norm in norms]
        first = torch.linalg.vector_norm(torch.stack(list(norms)))
    return first.detach()  # gradients that keep their graph have a norm that does


def _norm(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values, dtype=WIDER.get(values.dtype))
    return norm


def norms(tensors: Sequence[Tensor], order: float = 2.0) -> list[float]:
    """A norm of each tensor, 0.0 of an empty one; one read for each device and kind of number."""
    found = [0.0] * len(tensors)
    dense = [dense_values(tensor) if tensor.is_sparse else local(tensor).detach() for tensor in tensors]
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(dense):
        if tensor.numel():
            groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    for (_, dtype), indices in groups.items():
        values = [dense[index] for index in indices]
        numbers = torch.stack(torch._foreach_norm(values, order, WIDER.get(dtype))).tolist()
        for index, number in zip(indices, numbers, strict=True):
            found[index] = number
    return found


def exact_norm(values: Sequence[Tensor]) -> float:
    """2-norm in float64, for the rare gradient whose squares overflow its own precision. Reads from the device."""
    dense = map(dense_values, values)
    return math.sqrt(sum(float(torch.linalg.vector_norm(value, dtype=torch.float64)) ** 2 for value in dense))
