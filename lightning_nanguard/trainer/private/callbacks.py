"""The other callbacks: their order, and the averaged copies of the module they keep."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

_TUNERS = frozenset({"BatchSizeFinder", "LearningRateFinder"})


def put_first(trainer: Any, guard: Any) -> None:
    """Move the guard ahead of all callbacks but the tuners, so that none sees a state the guard is about to undo.

    The list is replaced rather than changed: Lightning may be walking over it.
    """
    others = [callback for callback in trainer.callbacks if callback is not guard]
    split = 0
    while split < len(others) and any(cls.__name__ in _TUNERS for cls in type(others[split]).__mro__):
        split += 1
    trainer.callbacks = [*others[:split], guard, *others[split:]]


def swaps_weights(trainer: Any) -> bool:
    """Whether a callback validates its average in the weights' place (WeightAveraging)."""
    return any(callable(getattr(callback, "_swap_models", None)) for callback in trainer.callbacks)


def averaged_copies(trainer: Any, module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Copies of the module's weights that callbacks keep (EMA, SWA, WeightAveraging), by callback.

    Lightning has no public name for them. A module, a dictionary or a list of tensors counts as a copy when it has the
    shapes (and names) of all parameters of the module, or of a part that holds at least half of what is trained, or of
    the trained ones among them; anything else a callback keeps is left alone.
    """
    candidates = {
        f"{type(callback).__name__}.{attribute} ({index})": tensors
        for index, callback in enumerate(trainer.callbacks)
        for attribute, value in vars(callback).items()
        if (tensors := _tensors_of(value))
    }
    if not candidates:
        return {}
    parts = list(_parts(module))
    live = {id(parameter) for parameter in module.parameters()}
    # The live module under another name holds the very same tensors, and those are rewound already.
    return {
        name: tensors
        for name, tensors in candidates.items()
        if not any(id(tensor) in live for tensor in tensors.values()) and _is_copy(tensors, parts)
    }


def _parts(module: nn.Module) -> Iterator[dict[str, torch.Size]]:
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad and not _waits(p))
    for part in module.modules():
        own = {name: parameter for name, parameter in part.named_parameters() if not _waits(parameter)}
        learning = {name: parameter for name, parameter in own.items() if parameter.requires_grad}
        if own and 2 * sum(parameter.numel() for parameter in learning.values()) >= trained:
            yield {name: parameter.shape for name, parameter in own.items()}
            yield {name: parameter.shape for name, parameter in learning.items()}


def _waits(parameter: Tensor) -> bool:
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
    # AveragedModel keeps its copy under "module".
    named = {name.removeprefix("module."): tensor.shape for name, tensor in tensors.items()}
    return any(all(named.get(name) == shape for name, shape in part.items()) for part in parts)
