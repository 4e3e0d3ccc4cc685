"""A first, cheap check of a state, which does not wait for the device."""

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
    """Sends one norm of each tensor of a state to the host: they show whether the tensors must be looked at.

    Args:
        tensors: What must be finite, and may not have grown too far since an older screen.
        wide: State keys of tensors with so many elements that their norm does not tell whether one has grown: their
            largest element is sent too.
        device: Sends them.
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
        """Whether reading it would not wait for a device."""
        return all(numbers.arrived() for _, numbers in self._sent)

    def beyond(self, before: Mapping[StateKey, float], factor: float, least: float = 1.0) -> set[StateKey]:
        """State keys of tensors that may not be finite, or of which an element may have grown too far.

        Args:
            before: The older screen's :attr:`typical`.
            factor: Growth of a tensor's largest element that would be too much.
            least: Magnitude from which growth is counted.
        """
        # The largest element lies between the root mean square and the norm, so no jump of it goes unseen.
        return {
            key
            for key, _, norm, largest in self._numbers
            if not (norm < math.inf and largest <= factor * max(before.get(key, self.typical[key]), least))
        }

    @cached_property
    def typical(self) -> dict[StateKey, float]:
        """Root mean square of each tensor; of the smallest one where a state key holds several."""
        found: dict[StateKey, float] = {}
        for key, elements, norm, _ in self._numbers:
            size = norm / math.sqrt(elements)
            found[key] = min(size, found.get(key, size))
        return found

    @cached_property
    def _numbers(self) -> list[tuple[StateKey, int, float, float]]:
        # Key, elements, norm and largest element, which is no larger than the norm where it was not sent.
        found = []
        for about, copy in self._sent:
            numbers = copy.read()
            largest = iter(numbers[len(about) :])
            for (key, elements, wide), norm in zip(about, numbers, strict=False):
                found.append((key, elements, norm, next(largest) if wide else norm))
        return found
