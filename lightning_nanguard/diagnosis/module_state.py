"""Reads and sets the parameters and buffers of a module by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


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
