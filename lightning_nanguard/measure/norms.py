"""Norms of tensors: fast ones for every update, exact ones for gradients that overflow, safe ones for metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter, methodcaller

import torch
from torch import Tensor

from lightning_nanguard.measure.tensors import WIDER, dense_values, is_on_host, is_plain, local, moved_to, stored_values
from lightning_nanguard.thresholds.measurement import MeasurementThresholds

# Used with `map`: with many small parameters a loop in Python takes longer than the norms.
_numel = methodcaller("numel")
_dtype = attrgetter("dtype")


def partial_norms(values: list[Tensor], thresholds: MeasurementThresholds = MeasurementThresholds()) -> list[Tensor]:
    """2-norms (0-dim) of single tensors or groups of small ones. Their own 2-norm is that of all tensors together.

    If the results are finite, every element is. The inverse does not hold, because squares may overflow.

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
    # Half precision overflows at 65,504, and larger norms are common.
    return torch._foreach_norm(values, 2, torch.float32)


def _norms_by_kind(values: list[Tensor]) -> list[Tensor]:
    # For tensors of several dtypes or devices in one call, torch computes each norm separately.
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, value in enumerate(values):
        kinds.setdefault((value.dtype, value.device), []).append(index)
    found: dict[int, Tensor] = {}
    for (dtype, _), indices in kinds.items():
        found.update(zip(indices, _norms_of([values[index] for index in indices], {dtype}), strict=True))
    return [found[index] for index in range(len(values))]


def joined_as(
    sizes: Sequence[int], thresholds: MeasurementThresholds = MeasurementThresholds()
) -> tuple[list[int], list[int]]:
    """Which tensors on the host belong to each norm that :func:`partial_norms` returns.

    Args:
        sizes: Numbers of elements of the tensors.
        thresholds: Which tensors are joined before their norm is taken.

    Returns:
        Numbers of tensors that were joined for the first norms, and indices of the tensors of the other norms.
    """
    if len(sizes) < thresholds.fewest_tensors_joined:
        return [], list(range(len(sizes)))
    step, largest = thresholds.tensors_per_join, thresholds.largest_tensor_joined
    small = sum(size <= largest for size in sizes)
    groups = [min(step, small - start) for start in range(0, small, step)]
    return groups, [place for place, size in enumerate(sizes) if size > largest]


def total_norm(norms: Sequence[Tensor]) -> Tensor:
    """2-norm of partial norms, a 0-dim float tensor on the device of the first one."""
    first = norms[0]
    if len(norms) > 1:
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        if any(norm.device != first.device or norm.dtype != dtype for norm in norms):
            norms = [moved_to(norm, first.device, dtype) for norm in norms]
        first = torch.linalg.vector_norm(torch.stack(list(norms)))
    return first.detach()  # if gradients have a graph, so does their norm


def each_norm(values: list[Tensor], order: float = 2.0) -> list[Tensor]:
    """A norm (0-dim) of each of several dense tensors. None may be empty, and all have the same device and dtype."""
    return list(torch._foreach_norm(values, order, WIDER.get(values[0].dtype))) if values else []


def norms(tensors: Sequence[Tensor], order: float = 2.0) -> list[float]:
    """A norm of each tensor; 0.0 for an empty one. Reads once from each device and for each dtype."""
    found = [0.0] * len(tensors)
    # Complex tensors are not split here, because the largest element is the one with the largest magnitude.
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


def double_norm(tensor: Tensor) -> float:
    """2-norm of one tensor, computed in float64. Reads from the device."""
    return float(_norm(dense_values(tensor), torch.float64))


def exact_norm(tensors: Sequence[Tensor]) -> float:
    """2-norm in float64, for gradients whose squares overflow their own precision. Reads from the device."""
    return math.sqrt(sum(double_norm(tensor) ** 2 for tensor in tensors))


def safe_norm(values: Tensor) -> Tensor:
    """2-norm (0-dim) of a dense tensor. It is finite exactly if all elements are. Waits for no device.

    A norm above the largest number of the result's dtype is replaced by this number.
    """
    if values.dtype != torch.float64 and values.device.type != "mps":
        # The squares of all narrower types fit into float64.
        return _norm(values, torch.float64)
    wide = values if values.dtype == torch.float64 else values.float()
    largest = torch.linalg.vector_norm(wide, torch.inf)
    norm = largest * torch.linalg.vector_norm(wide / torch.where(largest > 0, largest, 1.0))
    return clamped(norm, largest.isfinite(), wide.dtype)


def safe_total_norm(norms: Sequence[Tensor], device: torch.device) -> Tensor:
    """2-norm of norms from :func:`safe_norm`, in float32 on ``device``. It is finite exactly if all of them are."""
    parts = torch.stack([norm.to(device, widest_dtype(device)) for norm in norms])
    return clamped(safe_norm(parts), parts.isfinite().all())


def clamped(norm: Tensor, finite: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``norm`` in ``dtype``. If a finite norm is too large for ``dtype``, the largest number of ``dtype``."""
    largest = torch.finfo(dtype).max
    return torch.where(finite, norm.clamp(max=largest), norm).to(dtype)


def widest_dtype(device: torch.device) -> torch.dtype:
    """The widest floating-point type with which a device can compute."""
    return torch.float32 if device.type == "mps" else torch.float64


def _norm(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values, dtype=dtype or WIDER.get(values.dtype))
    return norm
