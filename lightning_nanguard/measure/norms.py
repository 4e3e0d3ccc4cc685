"""Norms of tensors: fast ones for every update, exact ones for gradients that overflow, safe ones for metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter, methodcaller

import torch
from torch import Tensor

from lightning_nanguard.measure.tensors import WIDER, dense_values, is_on_host, is_plain, local, moved_to, stored_values
from lightning_nanguard.thresholds.measurement import MeasurementThresholds

_DEFAULTS = MeasurementThresholds()

# Applied with `map`: a loop in Python costs more than the norms on a model of many small parameters.
_numel = methodcaller("numel")
_dtype = attrgetter("dtype")


def partial_norms(values: list[Tensor], thresholds: MeasurementThresholds = _DEFAULTS) -> list[Tensor]:
    """2-norms, 0-dim, whose own 2-norm is that over all tensors; fewer than there are tensors where these are small.

    Finite results prove every element finite; the inverse does not hold, since squares overflow.

    Args:
        values: Dense tensors.
        thresholds: Which tensors are joined before their norm is taken.
    """
    norms: list[Tensor] = []
    if len(values) >= thresholds.fewest_tensors_joined and all(map(is_on_host, values)):
        sizes, largest = list(map(_numel, values)), thresholds.largest_tensor_joined
        small = [value for value, size in zip(values, sizes, strict=True) if size <= largest]
        values = [value for value, size in zip(values, sizes, strict=True) if size > largest]
        step = thresholds.tensors_per_join
        norms = [
            _norm(torch._C._nn.flatten_dense_tensors(small[start : start + step]))
            for start in range(0, len(small), step)
        ]
    if len(values) == 1:
        norms.append(_norm(values[0]))
    elif values:
        dtypes = set(map(_dtype, values))
        norms += _norms_of(values, dtypes) if len(dtypes) == 1 else _norms_by_kind(values)
    return norms


def _norms_of(values: list[Tensor], dtypes: set[torch.dtype]) -> Sequence[Tensor]:
    if dtypes.isdisjoint(WIDER):
        return torch._foreach_norm(values)
    # Half precision overflows at 65,504, which is no unusual norm.
    return torch._foreach_norm(values, 2, torch.float32)


def _norms_by_kind(values: list[Tensor]) -> list[Tensor]:
    # Of several dtypes or devices at once torch takes each norm by itself.
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, value in enumerate(values):
        kinds.setdefault((value.dtype, value.device), []).append(index)
    found: dict[int, Tensor] = {}
    for (dtype, _), indices in kinds.items():
        found.update(zip(indices, _norms_of([values[index] for index in indices], {dtype}), strict=True))
    return [found[index] for index in range(len(values))]


def joined_as(sizes: Sequence[int], thresholds: MeasurementThresholds = _DEFAULTS) -> tuple[list[int], list[int]]:
    """What the norms that :func:`partial_norms` gives for tensors on the host are of.

    Args:
        sizes: Numbers of elements of the tensors.
        thresholds: Which tensors are joined before their norm is taken.

    Returns:
        How many tensors were joined for each of the first norms, and the places of the tensors that the others are of.
    """
    if len(sizes) < thresholds.fewest_tensors_joined:
        return [], list(range(len(sizes)))
    step, largest = thresholds.tensors_per_join, thresholds.largest_tensor_joined
    small = sum(size <= largest for size in sizes)
    groups = [min(step, small - start) for start in range(0, small, step)]
    return groups, [place for place, size in enumerate(sizes) if size > largest]


def total_norm(norms: Sequence[Tensor]) -> Tensor:
    """2-norm of partial norms, a 0-dim float tensor on the first one's device."""
    first = norms[0]
    if len(norms) > 1:
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        if any(norm.device != first.device or norm.dtype != dtype for norm in norms):
            norms = [moved_to(norm, first.device, dtype) for norm in norms]
        first = torch.linalg.vector_norm(torch.stack(list(norms)))
    return first.detach()  # gradients that keep their graph have a norm that does


def each_norm(values: list[Tensor], order: float = 2.0) -> list[Tensor]:
    """A norm of each of several dense tensors of one device and dtype, none of them empty; 0-dim."""
    return list(torch._foreach_norm(values, order, WIDER.get(values[0].dtype))) if values else []


def norms(tensors: Sequence[Tensor], order: float = 2.0) -> list[float]:
    """A norm of each tensor, 0.0 of an empty one; one read for each device and dtype."""
    found = [0.0] * len(tensors)
    # Complex numbers stay whole here: the largest element is that of the largest magnitude.
    whole = [local(tensor).detach() for tensor in tensors]
    dense = [one if is_plain(one) else stored_values(one) for one in whole]
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, values in enumerate(dense):
        if values.numel():
            groups.setdefault((values.device, values.dtype), []).append(index)
    for indices in groups.values():
        numbers = torch.stack(each_norm([dense[index] for index in indices], order)).tolist()
        for index, number in zip(indices, numbers, strict=True):
            found[index] = number
    return found


def float64_norm(tensor: Tensor) -> float:
    """2-norm of one tensor, summed up in float64. Reads from the device."""
    return float(_norm(dense_values(tensor), torch.float64))


def exact_norm(tensors: Sequence[Tensor]) -> float:
    """2-norm in float64, for the rare gradient whose squares overflow its own precision. Reads from the device."""
    return math.sqrt(sum(float64_norm(tensor) ** 2 for tensor in tensors))


def safe_norm(values: Tensor) -> Tensor:
    """2-norm of a dense tensor that is finite exactly when its elements are; 0-dim, waits for no device.

    A norm past the largest number of the result's dtype counts as that number.
    """
    if values.dtype != torch.float64 and values.device.type != "mps":
        # The squares of every narrower type fit into float64.
        return _norm(values, torch.float64)
    wide = values if values.dtype == torch.float64 else values.float()
    largest = torch.linalg.vector_norm(wide, torch.inf)
    norm = largest * torch.linalg.vector_norm(wide / torch.where(largest > 0, largest, 1.0))
    return clamped(norm, largest.isfinite(), wide.dtype)


def safe_total_norm(norms: Sequence[Tensor], device: torch.device) -> Tensor:
    """2-norm of norms from :func:`safe_norm`, in float32 on ``device``; finite exactly when all of them are."""
    parts = torch.stack([norm.to(device, widest_dtype(device)) for norm in norms])
    return clamped(safe_norm(parts), parts.isfinite().all())


def clamped(norm: Tensor, finite: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``norm`` in ``dtype``; where it is too large for that though ``finite``, the largest number of ``dtype``."""
    largest = torch.finfo(dtype).max
    return torch.where(finite, norm.clamp(max=largest), norm).to(dtype)


def widest_dtype(device: torch.device) -> torch.dtype:
    """The widest floating type that a device can compute with."""
    return torch.float32 if device.type == "mps" else torch.float64


def _norm(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values, dtype=dtype or WIDER.get(values.dtype))
    return norm
