"""Gradient clipping that can be turned on during a run, in addition to the user's own clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor

from lightning_nanguard.measure.norms import partial_norms, total_norm
from lightning_nanguard.measure.tensors import dense_gradients
from lightning_nanguard.thresholds.measurement import MeasurementThresholds


@final
class Clipper:
    """Clips gradients in place once a value is set. Without a value it does nothing.

    Args:
        thresholds: How norms are measured.
    """

    def __init__(self, thresholds: MeasurementThresholds = MeasurementThresholds()) -> None:
        self._thresholds = thresholds
        self.value: float | None = None
        self._algorithm: Literal["norm", "value"] = "norm"

    def set(self, value: float, algorithm: Literal["norm", "value"]) -> None:
        """Clip from now on, at the smaller one of this value and an earlier one of the algorithm; ``inf`` ends it."""
        if math.isinf(value):
            self.value = None
            return
        same = self.value is not None and algorithm == self._algorithm
        self.value = min(value, self.value) if same and self.value is not None else value
        self._algorithm = algorithm

    def clip(self, gradients: Sequence[Tensor], loss_scale: Tensor | None = None, norm: Tensor | None = None) -> None:
        """Clip in place, on a device without waiting for it.

        Args:
            gradients: The gradients of one optimizer, dense or sparse.
            loss_scale: The GradScaler's scale, if the gradients are still multiplied by it.
            norm: Norm of the whole gradient, scaled like the gradients, if it is known. It is required if this process
                holds only a part of the gradient.
        """
        if self.value is None or not gradients:
            return
        if self._algorithm == "value":
            limit = self.value if loss_scale is None else self.value * float(loss_scale)
            with torch.no_grad():
                for gradient in gradients:
                    _clamp(gradient, limit)
            return
        if norm is None:
            norm = total_norm(partial_norms(dense_gradients(list(gradients)), self._thresholds))
        largest = self.value if loss_scale is None else self.value * loss_scale.to(norm.device)
        factor = torch.clamp(largest / (norm + 1e-6), max=1.0)
        if not (factor.is_cpu and float(factor) == 1.0):
            _multiply(gradients, factor)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers."""
        return {"value": self.value, "algorithm": self._algorithm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.value = state["value"]
        self._algorithm = state["algorithm"]


def _multiply(tensors: Sequence[Tensor], factor: Tensor) -> None:
    # One call for all tensors of a dtype and device, because one call for each is slow for small tensors.
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    with torch.no_grad():
        for (dtype, device), group in groups.items():
            torch._foreach_mul_(group, factor.to(device, dtype))


def _clamp(gradient: Tensor, limit: float) -> None:
    if not gradient.is_sparse:
        gradient.clamp_(-limit, limit)
        return
    # Coalesced, so that duplicate entries of one element are added before clamping.
    whole = gradient.coalesce()
    whole.values().clamp_(-limit, limit)
    gradient.copy_(whole)
