"""Reads and sets the parameters and buffers of a module by name, or changes the signs of its weights for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_nanguard.measure.tensors import is_strided


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Every dense parameter and buffer of a module, including buffers that are not persistent."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    ready = {
        name: t for name, t in named.items() if not isinstance(t, (nn.UninitializedParameter, nn.UninitializedBuffer))
    }
    return {name: tensor.detach() for name, tensor in ready.items() if tensor.layout == torch.strided}


def trained_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter that requires a gradient, and has numbers."""
    named = module.named_parameters()
    return {name: p for name, p in named if p.requires_grad and not isinstance(p, nn.UninitializedParameter)}


def put_into(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state into a module that was built with the same arguments.

    Raises:
        ValueError: If the state does not fit the module.
    """
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    wrong = [name for name, value in state.items() if name not in own or own[name].shape != value.shape]
    if wrong:
        first = wrong[0]
        shape = tuple(own[first].shape) if first in own else "missing"
        raise ValueError(
            f"The saved state does not fit {type(module).__name__}: {first} is {tuple(state[first].shape)} in the "
            f"incident and {shape} in the module ({len(wrong)} such). Build the module with the arguments of the run."
        )
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)


@contextmanager
def other_signs(module: nn.Module, draw: int) -> Iterator[None]:
    """Inside, each row of a trained parameter has a random sign. Afterwards the weights are restored bit for bit.

    Args:
        module: The trained module.
        draw: Seed of the signs.

    Example:
        >>> layer = nn.Linear(1, 8)
        >>> before = layer.weight.detach().clone()
        >>> with other_signs(layer, 0):
        ...     torch.equal(layer.weight, before), torch.equal(layer.weight.abs(), before.abs())
        (False, True)
        >>> torch.equal(layer.weight, before)
        True
    """
    # Changed through ``data``: an autograd graph that is still needed would otherwise report modified weights.
    trained = [p.data for p in module.parameters() if p.requires_grad and is_strided(p) and p.is_floating_point()]
    generator = torch.Generator().manual_seed(draw)
    signs = [_signs(one, generator) for one in trained]
    try:
        _multiply(trained, signs)
        yield
    finally:
        _multiply(trained, signs)


def _signs(weights: Tensor, generator: torch.Generator) -> Tensor:
    rows = (*weights.shape[:1], *(1 for _ in weights.shape[1:]))
    return (torch.randint(0, 2, rows, generator=generator) * 2 - 1).to(weights)


def _multiply(weights: list[Tensor], signs: list[Tensor]) -> None:
    for one, sign in zip(weights, signs, strict=True):
        one.mul_(sign)
