"""Changes the signs of weights, to test whether a sample stays bad under other weights of the same size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_nanguard.measure.tensors import is_strided


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
