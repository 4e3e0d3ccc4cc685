"""Regressions on targets in their own units: the loss falls for long, and its first value says nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.rescue import data
from benchmarks.rescue.data import Batch, Split
from benchmarks.rescue.models import Loss, Task, mlp, squared

from .forms import Dice, Recipe, forms, split_rows


def absolute(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """Mean absolute error."""
    return functional.l1_loss(net(batch[0])[:, 0], batch[1])


def huber(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """Huber's loss with its usual threshold of one, whatever the unit."""
    return functional.huber_loss(net(batch[0])[:, 0], batch[1])


LOSSES: dict[str, Loss] = {"mse": squared, "l1": absolute, "huber": huber}


def in_units(dice: Dice, unit: float, mean: float) -> Split:
    """Rows of 4 to 20 inputs whose target has a mean of ``mean`` standard deviations of ``unit``."""
    g, inputs = dice.rows(), dice.randint(4, 20)
    x = torch.randn(720, inputs, generator=g)
    signal = x @ torch.randn(inputs, generator=g)
    if dice.random() < 0.5:
        signal = signal + signal.std() * torch.sin(2 * x[:, 0]) * x[:, 1]
    noise = dice.uniform(0.05, 0.6)
    z = (signal - signal.mean()) / signal.std() + noise * torch.randn(720, generator=g)
    return split_rows((x, unit * (mean + z / z.std())), 160)


def diabetes_in_units(unit: float, mean: float) -> Split:
    """scikit-learn's diabetes data in another unit."""
    clean = data.diabetes()
    return Split(*((x, unit * (mean + y)) for x, y in (clean.train, clean.held)))


def net_of(dice: Dice, kind: str, inputs: int) -> Callable[[], nn.Module]:
    """A linear model, an MLP, or an MLP with batch norm."""
    width, act = dice.choice((16, 32, 64)), dice.choice((nn.ReLU, nn.Tanh, nn.GELU))
    if kind == "linear":
        return lambda: nn.Linear(inputs, 1)
    if kind == "bn":
        return lambda: nn.Sequential(nn.Linear(inputs, width), nn.BatchNorm1d(width), act(), nn.Linear(width, 1))
    sizes = (inputs, width, 1) if dice.random() < 0.6 else (inputs, width, width, 1)
    return lambda: mlp(*sizes, act=act)


def rate_for(dice: Dice, net: str, loss: str, optimizer: str, far: float, steps: int) -> float:
    """A rate that fits the unit: the outputs have to come ``far`` within ``steps``.

    Adaptive optimizers also get, in half of the draws, a rate that people take whatever the unit is: the loss then
    falls slowly and has fallen by little in the end.
    """
    if optimizer in ("adam", "adamw", "rmsprop", "adagrad"):
        times = 5.0 if optimizer == "adagrad" else 1.0
        if dice.random() < 0.5:
            return times * dice.log(1e-3, 0.3)
        way = far if net == "linear" else (far / 48) ** 0.5
        return times * max(1e-3, way * dice.log(0.3, 3.0) / steps)
    slower = 0.2 if optimizer == "momentum" else 1.0
    if loss != "mse":
        return slower * far * (dice.log(0.3, 3.0) if net == "linear" else dice.log(0.03, 0.3)) / steps
    if net == "mlp":
        return slower * dice.log(3e-3, 3e-2) / far
    return slower * (dice.log(3e-3, 5e-2) if net == "linear" else dice.log(1e-3, 1e-2))


def draw(dice: Dice, net: str, loss: str, optimizer: str, *, diabetes: bool = False) -> Recipe:
    """A regression in a unit from 1 to 100,000 whose mean lies up to ten standard deviations from zero."""
    unit, mean = dice.log(1, 1e5), dice.uniform(0, 10)
    if diabetes:
        unit, mean = dice.choice(((77.0, 1.97), (unit, mean)))
    rows = diabetes_in_units(unit, mean) if diabetes else in_units(dice, unit, mean)
    batch, steps = dice.choice((16, 32, 64)), int(dice.log(150, 600))
    model = net_of(dice, net, rows.train[0].shape[1])
    rate = rate_for(dice, net, loss, optimizer, unit * (mean + 1), steps)
    schedule = dice.choice(("constant", "constant", "cosine", "onecycle"))
    task = Task(lambda: rows, model, LOSSES[loss], held=squared, batch=batch, steps=steps)
    return Recipe(task, rate, {"schedule": schedule})


def draw_diabetes(dice: Dice, _: str, net: str, loss: str, optimizer: str) -> Recipe:
    """The same on scikit-learn's diabetes data; in half of the draws in its own unit (mean 152, deviation 77)."""
    return draw(dice, net, loss, optimizer, diabetes=True)


FORMS = (
    *forms("units", draw, """linear/mse/adam linear/mse/adamw linear/mse/rmsprop linear/mse/adagrad linear/mse/sgd
           linear/mse/momentum linear/l1/adam linear/l1/sgd linear/huber/rmsprop linear/huber/momentum
           mlp/mse/adam mlp/mse/adamw mlp/mse/rmsprop mlp/mse/sgd mlp/l1/adam mlp/huber/adamw mlp/huber/sgd
           bn/mse/adam bn/mse/sgd bn/l1/rmsprop bn/huber/adam bn/huber/momentum""", 0.0),
    *forms("units", draw_diabetes, "diabetes/linear/mse/adam diabetes/linear/mse/sgd diabetes/mlp/mse/adam", 0.0),
)  # fmt: skip
"""The loss must have fallen; by how much depends on the rate."""
