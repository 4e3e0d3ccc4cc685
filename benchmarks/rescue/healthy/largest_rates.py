"""The largest rates that still end well, under each optimizer, on the suite's own tasks."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.rescue.cases import steps_of
from benchmarks.rescue.models import TASKS
from benchmarks.rescue.rates import RATES

from .forms import Dice, Recipe, forms

EASY = ("linear", "logistic", "mlp", "wine", "regression", "pixels", "bag")
DEEP = ("cnn", "gru", "rnn", "transformer", "embedding", "autoencoder")


def draw(dice: Dice, which: str, optimizer: str) -> Recipe:
    """A task, at 0.6 to 1.0 times the largest rate in the table that still ends well."""
    name = dice.choice(EASY if which == "easy" else DEEP)
    steps, batch = steps_of(name, optimizer)
    task = replace(TASKS[name], steps=steps, batch=batch or TASKS[name].batch)
    _, largest, _ = RATES[name][optimizer]
    schedule = "constant" if optimizer == "lbfgs" else dice.choice(("constant", "constant", "cosine", "onecycle"))
    return Recipe(task, largest * dice.uniform(0.6, 1.0), {"schedule": schedule})


FORMS = forms(
    "largest_rate", draw,
    """easy/sgd easy/momentum easy/adam easy/adamw easy/rmsprop easy/adagrad easy/lbfgs
    deep/sgd deep/momentum deep/adam deep/adamw deep/rmsprop deep/adagrad""", 0.2,
)  # fmt: skip
"""A draw whose bare run does not take a fifth off its loss is set aside: its rate was above the largest."""
