"""Averaged copies of the module that other callbacks keep."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from lightning_nanguard.state.learner import unwrapped
from lightning_nanguard.thresholds.checkpoints import CheckpointsThresholds


def swaps_weights(trainer: Any) -> bool:
    """Whether a callback validates its average in the weights' place (WeightAveraging)."""
    return any(callable(getattr(callback, "_swap_models", None)) for callback in trainer.callbacks)


def averaged_copies(
    trainer: Any, module: nn.Module, thresholds: CheckpointsThresholds | None = None
) -> dict[str, dict[str, Tensor]]:
    """Copies of the module's weights that callbacks keep (EMA, SWA, WeightAveraging), by callback.

    Lightning has no public name for them. A module, a dictionary or a list of tensors counts as a copy when it has the
    shapes (and names) of all parameters of the module, or of a part that holds a large share of what is trained, or of
    the trained ones among them; anything else a callback keeps is left alone.

    Args:
        trainer: The trainer.
        module: Its module.
        thresholds: How large that share is.
    """
    candidates = {
        f"{type(callback).__name__}.{attribute} ({index})": tensors
        for index, callback in enumerate(trainer.callbacks)
        for attribute, value in vars(callback).items()
        if (tensors := _tensors_of(value))
    }
    if not candidates:
        return {}
    share = (CheckpointsThresholds() if thresholds is None else thresholds).averaged_copy_share
    shapes = list(_shapes_of_copies(module, share))
    live = {id(parameter) for parameter in module.parameters()}
    # The live module under another name holds the very same tensors, and those are rewound already.
    return {
        name: tensors
        for name, tensors in candidates.items()
        if not any(id(tensor) in live for tensor in tensors.values()) and _is_copy(tensors, shapes)
    }


def _shapes_of_copies(module: nn.Module, share: float) -> Iterator[dict[str, torch.Size]]:
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad and not _is_lazy(p))
    for part in module.modules():
        own = {name: parameter for name, parameter in part.named_parameters() if not _is_lazy(parameter)}
        learning = {name: parameter for name, parameter in own.items() if parameter.requires_grad}
        if own and sum(parameter.numel() for parameter in learning.values()) >= share * trained:
            yield {name: parameter.shape for name, parameter in own.items()}
            yield {name: parameter.shape for name, parameter in learning.items()}


def _is_lazy(parameter: Tensor) -> bool:
    lazy: bool = is_lazy(parameter)
    return lazy


def _tensors_of(value: Any) -> dict[str, Tensor]:
    if isinstance(value, nn.Module):
        return {} if isinstance(value, Metric) else dict([*value.named_parameters(), *value.named_buffers()])
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    # Before names are made: a callback may keep long lists of something else.
    if not items or not all(isinstance(item, Tensor) for item in items):
        return {}
    if isinstance(value, dict):
        return {str(name): item for name, item in value.items()}
    return {f"#{number}": item for number, item in enumerate(value)}


def _is_copy(tensors: dict[str, Tensor], parts: list[dict[str, torch.Size]]) -> bool:
    if "#0" in tensors:
        shapes = [tensor.shape for tensor in tensors.values()]
        return any(shapes == list(part.values()) for part in parts)
    named = {unwrapped(name): tensor.shape for name, tensor in tensors.items()}
    return any(all(named.get(name) == shape for name, shape in part.items()) for part in parts)
