"""A first look at a state that waits for no device: it is plainly fine, or has to be looked into."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from lightning_nanguard.learner import Path
from lightning_nanguard.measure import Parcel, dense_values, each_norm


@final
class Glance:
    """One norm of each tensor of a state, on their way to the host.

    Args:
        tensors: What must be finite, and may not have grown beyond measure since an older glance.
    """

    def __init__(self, tensors: Iterable[tuple[Path, Tensor]]) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[tuple[Path, Tensor]]] = {}
        for path, tensor in tensors:
            if (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel():
                values = dense_values(tensor)
                groups.setdefault((values.device, values.dtype), []).append((path, values))
        self._norms = [
            (
                [(path, values.numel()) for path, values in group],
                Parcel(torch.stack(each_norm([values for _, values in group]))),
            )
            for group in groups.values()
        ]

    def arrived(self) -> bool:
        """Whether reading it would not wait for a device."""
        return all(parcel.arrived() for _, parcel in self._norms)

    def fine(self, before: Mapping[Path, float], factor: float) -> bool:
        """Whether all is surely finite, and no element can have grown ``factor`` times, above 1.

        Args:
            before: The older glance's :attr:`typical`.
            factor: Growth of a tensor's largest element that would be too much.
        """
        # A largest element m lies between the root mean square and the norm: no jump of m goes unseen.
        return all(norm <= factor * max(before.get(path, self.typical[path]), 1.0) for path, _, norm in self._numbers)

    @cached_property
    def typical(self) -> dict[Path, float]:
        """Root mean square of each tensor; of the smallest one where a path holds several."""
        found: dict[Path, float] = {}
        for path, elements, norm in self._numbers:
            size = norm / math.sqrt(elements)
            found[path] = min(size, found.get(path, size))
        return found

    @cached_property
    def _numbers(self) -> list[tuple[Path, int, float]]:
        return [
            (path, elements, norm)
            for about, parcel in self._norms
            for (path, elements), norm in zip(about, parcel.read(), strict=True)
        ]
