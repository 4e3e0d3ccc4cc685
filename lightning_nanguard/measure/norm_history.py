"""Stores gradient norms of the newest updates, layer by layer, on their device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from lightning_nanguard.errors import require
from lightning_nanguard.measure.norms import joined_as
from lightning_nanguard.thresholds.measurement import MeasurementThresholds


@final
class NormHistory:
    """Stores the partial norms of the gradients for the newest updates.

    The norms stay on their device, and are read only on request. Small tensors that were joined before the measurement
    have one norm together.

    Args:
        thresholds: Number of updates whose norms are stored.
    """

    def __init__(self, thresholds: MeasurementThresholds | None = None) -> None:
        self._thresholds = MeasurementThresholds() if thresholds is None else thresholds
        kept = self._thresholds.updates_with_layer_norms
        require(kept >= 1, self._thresholds, "updates_with_layer_norms", kept, "at least 1")
        self._newest: deque[tuple[int, int, list[Tensor], tuple[bool, ...] | None]] = deque(maxlen=kept)

    def keep(self, step: int, optimizer_index: int, norms: list[Tensor], which: tuple[bool, ...] | None = None) -> None:
        """Store the partial norms of an update. This runs in every update.

        Args:
            step: Number of the update.
            optimizer_index: Index of the optimizer.
            norms: The result of :func:`~lightning_nanguard.measure.norms.partial_norms`.
            which: For each tensor that the optimizer steps, whether it had a gradient; ``None`` if all of them had one.
        """
        if norms and norms[0].requires_grad:
            norms = [norm.detach() for norm in norms]  # a graph would stay in memory
        if self._newest and self._newest[-1][:2] == (step, optimizer_index):
            self._newest.pop()  # the step was made again
        self._newest.append((step, optimizer_index, norms, which))

    def read(
        self, named_sizes: Callable[[int], Sequence[tuple[str, int]]]
    ) -> tuple[list[int], dict[str, list[float | None]]]:
        """Read the norms. Waits for the device.

        Args:
            named_sizes: Names and sizes of the tensors that an optimizer steps.

        Returns:
            The numbers of the updates, oldest first; and for each layer its norm in each of them, ``None`` without a
            gradient.
        """
        named = {index: named_sizes(index) for _, index, _, _ in self._newest}
        rows = [self._by_layer(named[index], norms, which) for _, index, norms, which in self._newest]
        layers = dict.fromkeys(layer for row in rows for layer in row)
        return [step for step, *_ in self._newest], {layer: [row.get(layer) for row in rows] for layer in layers}

    def _by_layer(
        self, named: Sequence[tuple[str, int]], norms: Sequence[Tensor], which: tuple[bool, ...] | None
    ) -> Mapping[str, float]:
        if which is not None and len(which) == len(named):
            named = [one for one, has_gradient in zip(named, which, strict=True) if has_gradient]
        labels = [_layer(name) for name, _ in named]
        if len(labels) != len(norms):
            joined, alone = joined_as([size for _, size in named], self._thresholds)
            labels = [*(f"{count} small tensors" for count in joined), *(labels[place] for place in alone)]
        if len(labels) != len(norms) or not norms:
            return {}  # parameters have been added or removed
        squares: dict[str, float] = {}
        numbers = torch.stack([norm.to("cpu", torch.float64) for norm in norms]).tolist()
        for label, number in zip(labels, numbers, strict=True):
            squares[label] = squares.get(label, 0.0) + number * number
        return {label: square**0.5 for label, square in squares.items()}


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0] or parameter
