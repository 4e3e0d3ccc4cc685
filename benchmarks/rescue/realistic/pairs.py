"""A contrastive model with two towers and a learned temperature: which right half belongs to which left half."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.rescue.data import Batch, Split, digits
from benchmarks.rescue.models import Task

from .images import enlarged

BATCH = 64


@lru_cache
def halves() -> Split:
    """Left and right halves of digits of 16×16."""
    images = [enlarged(rows).squeeze(1) / 2 + 0.5 for rows in (digits().train[0], digits().held[0])]
    train, held = ((x[:, :, :8].flatten(1), x[:, :, 8:].flatten(1)) for x in images)
    return Split(train, held)


def _tower() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 384), nn.GELU(), nn.Linear(384, 384), nn.GELU(), nn.Linear(384, 64))


class Towers(nn.Module):
    """Two towers and the logarithm of a temperature's inverse."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = _tower(), _tower()
        self.temperature = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = functional.normalize(self.left(left), dim=1), functional.normalize(self.right(right), dim=1)
        return self.temperature.exp() * (a @ b.T).float()


def _matched(net: nn.Module, left: Tensor, right: Tensor) -> Tensor:
    logits, own = net(left, right), torch.arange(len(left))
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def matched(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """InfoNCE in both directions, with noise on the images."""
    left, right = (x + 0.05 * torch.randn_like(x) for x in batch)
    return _matched(net, left, right)


def matched_held(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """The same without noise, over batches of the training's size."""
    parts = zip(*(x.split(BATCH) for x in batch), strict=True)
    return torch.stack([_matched(net, left, right) for left, right in parts if len(left) == BATCH]).mean()


TASKS: dict[str, Task] = {"towers": Task(halves, Towers, matched, held=matched_held, batch=BATCH, steps=250)}
