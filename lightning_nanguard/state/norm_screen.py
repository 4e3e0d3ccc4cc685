"""A first look at a state that waits for no device: it is plainly fine, or has to be looked into."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from lightning_nanguard.measure.host_copy import HostCopy
from lightning_nanguard.measure.norms import each_norm
from lightning_nanguard.measure.tensors import dense_values
from lightning_nanguard.state.learner import StateKey


@final
class NormScreen:
    """One norm of each tensor of a state, on their way to the host.

    Args:
        tensors: What must be finite, and may not have grown beyond measure since an older glance.
        wide: Paths of tensors with so many elements that their norm does not tell whether one has grown: the largest
            element is sent too.
    """

    def __init__(self, tensors: Iterable[tuple[StateKey, Tensor]], wide: Collection[StateKey] = ()) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[tuple[StateKey, Tensor]]] = {}
        for path, tensor in tensors:
            if (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel():
                values = dense_values(tensor)
                groups.setdefault((values.device, values.dtype), []).append((path, values))
        self._norms = [
            (
                [(path, values.numel(), path in wide) for path, values in group],
                HostCopy(
                    torch.stack(
                        each_norm([values for _, values in group])
                        + each_norm([values for path, values in group if path in wide], math.inf)
                    )
                ),
            )
            for group in groups.values()
        ]

    def arrived(self) -> bool:
        """Whether reading it would not wait for a device."""
        return all(parcel.arrived() for _, parcel in self._norms)

    def beyond(self, before: Mapping[StateKey, float], factor: float) -> set[StateKey]:
        """Paths of tensors of which it is not sure that they are finite, and that no element has grown too far.

        Args:
            before: The older glance's :attr:`typical`.
            factor: Growth of a tensor's largest element, above 1, that would be too much.
        """
        # A largest element m lies between the root mean square and the norm: no jump of m goes unseen.
        return {
            path
            for path, _, norm, largest in self._numbers
            if not (norm < math.inf and largest <= factor * max(before.get(path, self.typical[path]), 1.0))
        }

    @cached_property
    def typical(self) -> dict[StateKey, float]:
        """Root mean square of each tensor; of the smallest one where a path holds several."""
        found: dict[StateKey, float] = {}
        for path, elements, norm, _ in self._numbers:
            size = norm / math.sqrt(elements)
            found[path] = min(size, found.get(path, size))
        return found

    @cached_property
    def _numbers(self) -> list[tuple[StateKey, int, float, float]]:
        found = []
        for about, parcel in self._norms:
            numbers = parcel.read()
            largest = iter(numbers[len(about) :])
            for (path, elements, wide), norm in zip(about, numbers, strict=False):
                found.append((path, elements, norm, next(largest) if wide else norm))
        return found
