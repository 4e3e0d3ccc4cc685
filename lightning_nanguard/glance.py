"""A first look at a state that waits for no device: it is plainly fine, or has to be looked into."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import final

import torch
from torch import Tensor

from lightning_nanguard.learner import Path
from lightning_nanguard.measure import Parcel, dense_values, partial_norms, total_norm


@final
class Glance:
    """A few numbers about a state, on their way to the host.

    Args:
        tensors: What must be finite.
        statistics: What may not have grown beyond measure since an older glance.
    """

    def __init__(self, tensors: Iterable[Tensor], statistics: Mapping[Path, Tensor]) -> None:
        values: dict[torch.device, list[Tensor]] = {}
        for tensor in tensors:
            if (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel():
                values.setdefault(tensor.device, []).append(dense_values(tensor))
        self._norms = [Parcel(total_norm(partial_norms(group)).reshape(1)) for group in values.values()]
        groups: dict[tuple[torch.device, torch.dtype], list[Path]] = {}
        for path, tensor in statistics.items():
            if tensor.is_floating_point() and tensor.numel():
                groups.setdefault((tensor.device, tensor.dtype), []).append(path)
        self._largest = [
            (paths, Parcel(torch.stack(torch._foreach_norm([statistics[path].detach() for path in paths], math.inf))))
            for paths in groups.values()
        ]

    def arrived(self) -> bool:
        """Whether reading it would not wait for a device."""
        return all(parcel.arrived() for parcel in (*self._norms, *(parcel for _, parcel in self._largest)))

    def finite(self) -> bool:
        """Whether all is surely finite."""
        return all(math.isfinite(number) for parcel in self._norms for number in parcel.read())

    def largest(self) -> dict[Path, float]:
        """Largest absolute value of each of the statistics."""
        return {
            path: number for paths, parcel in self._largest for path, number in zip(paths, parcel.read(), strict=True)
        }
