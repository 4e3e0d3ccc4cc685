"""Copies gradients, and makes the undo of a micro-batch, if there is enough memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.state.device import OutOfMemory


def gradients_of(parameters: Sequence[Tensor]) -> list[Any]:
    """Copies of the gradients of some parameters; ``None`` for a parameter without one."""
    return [None if p.grad is None else p.grad.detach().clone() for p in parameters]


def gradients_if_room(parameters: Sequence[Tensor]) -> list[Any] | None:
    """Copies of the gradients of some parameters; ``None`` if there is not enough memory."""
    try:
        return gradients_of(parameters)
    except OutOfMemory:
        return None


def undo_if_room(make_undo: Callable[..., BatchUndo], parameters: Sequence[Tensor]) -> BatchUndo | None:
    """An object that undoes a micro-batch; ``None`` if memory is not enough for it and for copies of gradients.

    Args:
        make_undo: Makes the object.
        parameters: The parameters with gradients.
    """
    try:
        undo = make_undo(thorough=True)
        undo.open()
    except OutOfMemory:
        return None
    return None if gradients_if_room(parameters) is None else undo


def give_gradients(parameters: Sequence[Tensor], gradients: Sequence[Any]) -> None:
    """Set the gradients of some parameters."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
