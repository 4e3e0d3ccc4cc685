"""Noise and nothing else: no batch tells anything of the next."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.rescue.models import Loss, Task, Transformer, cross_entropy, mlp, next_token, squared

from .forms import Dice, Recipe, forms, split_rows, usual_rate
from .units import absolute


def draw(dice: Dice, problem: str, optimizer: str) -> Recipe:
    """Targets that have nothing to do with the inputs; few rows are learned by heart, many are not."""
    g, rows = dice.rows(), int(dice.log(300, 8000))
    x = torch.randn(rows, 16, generator=g)
    width, loss = dice.choice((16, 48)), squared
    net: Callable[[], nn.Module] = lambda: mlp(16, width, 1)  # noqa: E731
    tensors = (x, torch.randn(rows, generator=g))
    if problem == "labels":
        tensors, loss = (x, torch.randint(5, (rows,), generator=g)), cross_entropy
        net = lambda: mlp(16, width, 5)  # noqa: E731
    elif problem == "norm":
        net = lambda: nn.Sequential(nn.Linear(16, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 1))  # noqa: E731
    elif problem == "heavy":
        chi = torch.randn(rows, 3, generator=g).square().sum(-1) / 3
        tensors, loss = (x, tensors[1] / chi.sqrt()), _choose(dice)
    elif problem == "words":
        tensors, loss = (torch.randint(12, (rows, 13), generator=g),), next_token
        net = Transformer
    steps = int(dice.log(150, 250) if problem == "words" else dice.log(200, 500))
    task = Task(lambda: split_rows(tensors, rows // 6), net, loss, batch=dice.choice((4, 16, 32)), steps=steps)
    return Recipe(task, usual_rate(dice, optimizer))


def _choose(dice: Dice) -> Loss:
    return absolute if dice.random() < 0.5 else squared


FORMS = forms(
    "noise", draw,
    """labels/adam labels/sgd labels/momentum values/adam values/sgd values/rmsprop norm/adam norm/momentum
    heavy/adam heavy/sgd words/adamw words/sgd""", -1.5,
)  # fmt: skip
"""What is learned by heart costs on held-out rows."""
