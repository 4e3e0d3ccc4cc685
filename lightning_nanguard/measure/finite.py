"""Which tensors hold a non-finite element."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_nanguard.measure.batches import floating_tensors
from lightning_nanguard.measure.norms import partial_norms, total_norm
from lightning_nanguard.measure.tensors import WIDER, dense_values


def all_finite(tensor: Tensor) -> bool:
    """Whether every element is finite. Reads from the device."""
    return not suspects([tensor])


def suspects(tensors: Sequence[Tensor]) -> list[int]:
    """Indices of the tensors that hold a non-finite element; one read for each device, one more for each suspect."""
    groups: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel() > 0:
            groups.setdefault(tensor.device, []).append(index)
    bad: list[int] = []
    for indices in groups.values():
        values = [dense_values(tensors[index]) for index in indices]
        # A finite norm proves every element finite in one cheap pass.
        if not math.isfinite(float(total_norm(partial_norms(values)))):
            bad += _among(indices, values)
    return sorted(bad)


def _among(indices: Sequence[int], values: Sequence[Tensor]) -> list[int]:
    sums = torch.stack([value.sum(dtype=WIDER.get(value.dtype)).to(torch.float32) for value in values]).tolist()
    # An infinite one may be an overflow of the sum alone: look at every element.
    return [
        index
        for index, value, total in zip(indices, values, sums, strict=True)
        if not math.isfinite(total) and not bool(torch.isfinite(value).all())
    ]


def batch_finite(batch: Any) -> bool | None:
    """Whether every floating tensor in a nested batch is finite; ``None`` when it holds no floating tensor."""
    seen = False
    for tensor in floating_tensors(batch):
        seen = True
        if not all_finite(tensor):
            return False
    return True if seen else None
