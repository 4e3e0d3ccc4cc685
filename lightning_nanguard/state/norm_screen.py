"""A cheap first check of a state, which does not wait for the device."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from lightning_nanguard.measure.norms import each_norm
from lightning_nanguard.measure.tensors import dense_values
from lightning_nanguard.state.device import Device
from lightning_nanguard.state.learner import StateKey


@final
class NormScreen:
    """Sends one norm of each tensor of a state to the host. The norms show which tensors must be checked.

    Args:
        tensors: Tensors that must be finite, and must not have grown too far since an older screen.
        wide: State keys of tensors with so many elements that the norm does not show whether one has grown. Their
            largest element is sent too.
        device: Sends the norms.
    """

    def __init__(
        self,
        tensors: Iterable[tuple[StateKey, Tensor]],
        wide: Collection[StateKey] = (),
        device: Device | None = None,
    ) -> None:
        device = Device() if device is None else device
        groups: dict[tuple[torch.device, torch.dtype], list[tuple[StateKey, Tensor]]] = {}
        for key, tensor in tensors:
            if (tensor.is_floating_point() or tensor.is_complex()) and (values := dense_values(tensor)).numel():
                groups.setdefault((values.device, values.dtype), []).append((key, values))
        self._sent = [
            (
                [(key, values.numel(), key in wide) for key, values in group],
                device.read_later(
                    torch.stack(
                        each_norm([values for _, values in group])
                        + each_norm([values for key, values in group if key in wide], math.inf)
                    )
                ),
            )
            for group in groups.values()
        ]

    def arrived(self) -> bool:
        """Whether reading the norms would not wait for a device."""
        return all(numbers.arrived() for _, numbers in self._sent)

    def beyond(self, before: Mapping[StateKey, float], factor: float, least: float = 1.0) -> set[StateKey]:
        """State keys of tensors that may not be finite, or that may have an element that has grown too far.

        Args:
            before: :attr:`typical` of the older screen.
            factor: Growth of a tensor's largest element that is too much.
            least: Magnitude from which growth is counted.
        """
        # The largest element lies between the root mean square and the norm, so this misses no jump of it.
        return {
            key
            for key, _, norm, largest in self._numbers
            if not (norm < math.inf and largest <= factor * max(before.get(key, self.typical[key]), least))
        }

    @cached_property
    def typical(self) -> dict[StateKey, float]:
        """Root mean square of each tensor. For a state key with several tensors, the smallest one."""
        found: dict[StateKey, float] = {}
        for key, elements, norm, _ in self._numbers:
            size = norm / math.sqrt(elements)
            found[key] = min(size, found.get(key, size))
        return found

    @cached_property
    def _numbers(self) -> list[tuple[StateKey, int, float, float]]:
        # Key, number of elements, norm, and largest element, or the norm as its upper bound if it was not sent.
        found = []
        for about, copy in self._sent:
            numbers = copy.read()
            largest = iter(numbers[len(about) :])
            for (key, elements, wide), norm in zip(about, numbers, strict=False):
                found.append((key, elements, norm, next(largest) if wide else norm))
        return found
