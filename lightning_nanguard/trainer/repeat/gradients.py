"""Copies of gradients, and what undoes a micro-batch, as far as memory has room for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.state.device import OutOfMemory


def gradients_of(parameters: Sequence[Tensor]) -> list[Any]:
    """Copies of the gradients of some parameters; ``None`` for one without."""
    return [None if p.grad is None else p.grad.detach().clone() for p in parameters]


def gradients_if_room(parameters: Sequence[Tensor]) -> list[Any] | None:
    """Copies of the gradients of some parameters; ``None`` if memory is too short for them."""
    try:
        return gradients_of(parameters)
    except OutOfMemory:
        return None


def undo_if_room(make_undo: Callable[..., BatchUndo], parameters: Sequence[Tensor]) -> BatchUndo | None:
    """What undoes a micro-batch; ``None`` if memory is too short for it and for copies of the gradients.

    Args:
        make_undo: Makes it.
        parameters: Those with gradients.
    """
    try:
        undo = make_undo(thorough=True)
        undo.open()
    except OutOfMemory:
        return None
    return None if gradients_if_room(parameters) is None else undo


def give_gradients(parameters: Sequence[Tensor], gradients: Sequence[Any]) -> None:
    """Give some parameters other gradients."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
