"""The other callbacks: their order, and the averaged copies of the module they keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
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


def averaged_copies(trainer: Any, module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Copies of the module's weights that callbacks keep (EMA, SWA, WeightAveraging), by callback.

    Lightning has no public name for them: whatever holds tensors of the same shapes as the module's parameters, under
    the same names, is such a copy; anything else a callback keeps is left alone.
    """
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    found: dict[str, dict[str, Tensor]] = {}
    for index, callback in enumerate(trainer.callbacks):
        for attribute, value in vars(callback).items():
            tensors = _copy_of(value, module, shapes)
            if tensors:
                found[f"{type(callback).__name__}.{attribute} ({index})"] = tensors
    return found


def _copy_of(value: Any, module: nn.Module, shapes: Mapping[str, Any]) -> dict[str, Tensor]:
    if isinstance(value, nn.Module):
        if value is module or isinstance(value, Metric):
            return {}
        tensors: dict[str, Tensor] = {**dict(value.named_parameters()), **dict(value.named_buffers())}
    elif isinstance(value, dict) and value and all(isinstance(item, Tensor) for item in value.values()):
        tensors = value
    else:
        return {}
    if not shapes:
        return {}
    trimmed = {str(name).removeprefix("module."): tensor for name, tensor in tensors.items()}
    # The live module under another name holds the very same tensors, and those are rewound already.
    live = {id(parameter) for parameter in module.parameters()}
    if any(id(tensor) in live for tensor in tensors.values()):
        return {}
    shared = [name for name, shape in shapes.items() if name in trimmed and trimmed[name].shape == shape]
    return {str(name): tensor for name, tensor in tensors.items()} if len(shared) == len(shapes) else {}
