"""Checks whether tensors and batches are finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_nanguard.measure.batches import floating_tensors, named_tensors
from lightning_nanguard.measure.norms import partial_norms, total_norm
from lightning_nanguard.measure.tensors import WIDER, dense_values
from lightning_nanguard.thresholds.fixed import ELEMENTS_AT_ONCE


def all_finite(tensor: Tensor) -> bool:
    """Whether every element is finite. Reads from the device."""
    return not non_finite_indices([tensor])


def has_nan(tensor: Tensor) -> bool:
    """Whether a tensor holds NaN. Reads from the device."""
    return bool(torch.isnan(dense_values(tensor.detach())).any())


def bad_unless_masked(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds NaN or +Inf; −Inf stands for a mask. Reads from the device."""
    return tensor.is_floating_point() and not bool((dense_values(tensor) < math.inf).all())


def non_finite_indices(tensors: Sequence[Tensor]) -> list[int]:
    """Indices of the tensors with an element that is not finite. Reads once from each device, more if there are any.

    Tensors of integers, and empty tensors, count as finite.
    """
    groups: dict[torch.device, tuple[list[int], list[Tensor]]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.is_floating_point() or tensor.is_complex():
            dense = dense_values(tensor)
            if dense.numel() > 0:
                indices, values = groups.setdefault(dense.device, ([], []))
                indices.append(index)
                values.append(dense)
    bad: list[int] = []
    for indices, values in groups.values():
        # One cheap pass: if the norm is finite, every element is.
        if not math.isfinite(float(total_norm(partial_norms(values)))):
            bad += _non_finite_among(indices, values)
    return sorted(bad)


def _non_finite_among(indices: Sequence[int], values: Sequence[Tensor]) -> list[int]:
    sums = torch.stack([value.sum(dtype=WIDER.get(value.dtype)).to(torch.float32) for value in values]).tolist()
    # A finite tensor may have a sum that overflows, so check every element then.
    return [
        index
        for index, value, total in zip(indices, values, sums, strict=True)
        if not math.isfinite(total) and not _each_finite(value, ELEMENTS_AT_ONCE)
    ]


def _each_finite(value: Tensor, most: int) -> bool:
    # Check in pieces: a mask of all elements takes memory, and the device may be full.
    pieces = torch.split(value.flatten(), most)
    return bool(torch.stack([torch.isfinite(piece).all() for piece in pieces]).all())


def batch_finite(batch: Any) -> bool | None:
    """Whether every floating-point tensor in a nested batch is finite; ``None`` if it has no such tensor."""
    seen = False
    for tensor in floating_tensors(batch):
        seen = True
        if not all_finite(tensor):
            return False
    return True if seen else None


def non_finite_fields(batches: Iterable[Any]) -> frozenset[str]:
    """Paths of the fields that hold NaN or Inf in at least one of some batches.

    In a field in which healthy batches hold some, they stand for something, such as a missing label or a mask.
    """
    return frozenset(name for batch in batches for name, tensor in named_tensors(batch) if not all_finite(tensor))
