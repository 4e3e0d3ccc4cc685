"""What a drawn healthy form is, and the chance it draws from."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.rescue.cases import Case
from benchmarks.rescue.data import Batch, Split
from benchmarks.rescue.models import Task


class Dice(random.Random):
    """Source of chance of one draw."""

    def log(self, low: float, high: float) -> float:
        """A number between two others, uniform in its logarithm."""
        return float(low * (high / low) ** self.random())

    def rows(self) -> torch.Generator:
        """A generator for the tensors of the draw."""
        return torch.Generator().manual_seed(self.randrange(2**31))


@dataclass(frozen=True)
class Recipe:
    """What a draw settles.

    Attributes:
        task: What is learned, by what, from what, in how many steps.
        rate: Learning rate.
        options: Further fields of the case, such as ``schedule`` and ``clip_val``.
    """

    task: Task
    rate: float
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DrawnForm:
    """A kind of healthy run, of which a seed makes a case.

    Attributes:
        name: ``kind:words/optimizer``; the kind is the report's group.
        optimizer: Name of the optimizer.
        draw_recipe: Draws the rest.
        least_gain: Share of the untrained held-out loss by which it must fall for the bare run to count as healthy.
            Below zero it may rise by so much, where nothing can be learned or the run is too short for it.
    """

    name: str
    optimizer: str
    draw_recipe: Callable[[Dice], Recipe]
    least_gain: float

    @property
    def kind(self) -> str:
        """Group in the report."""
        return self.name.partition(":")[0]

    def draw(self, seed: int) -> Case:
        """The case of this form that ``seed`` stands for."""
        dice = Dice(f"{self.name} {seed}")
        number = dice.randrange(2**31)
        recipe = self.draw_recipe(dice)
        name, task = f"{self.name}#{seed}", recipe.task
        return Case(
            name, self.name, self.optimizer, recipe.rate, task.steps, number, own_task=task, **recipe.options
        )  # fmt: skip


def forms(kind: str, draw_recipe: Callable[..., Recipe], specs: str, least_gain: float = 0.1) -> tuple[DrawnForm, ...]:
    """Forms from their short notation: words, the last of which is the optimizer; ``draw_recipe`` takes all of them."""
    made = []
    for spec in specs.split():
        words = spec.split("/")
        made.append(DrawnForm(f"{kind}:{spec}", words[-1], partial(_recipe, draw_recipe, words), least_gain))
    return tuple(made)


def _recipe(draw_recipe: Callable[..., Recipe], words: list[str], dice: Dice) -> Recipe:
    return draw_recipe(dice, *words)


def split_rows(tensors: Batch, held: int) -> Split:
    """The last ``held`` rows are held out; rows of a draw are independent, so that any will do."""
    return Split(tuple(t[:-held] for t in tensors), tuple(t[-held:] for t in tensors))


USUAL_RATES: dict[str, tuple[float, float]] = {
    "adam": (1e-3, 1e-2),
    "adamw": (1e-3, 1e-2),
    "rmsprop": (5e-4, 5e-3),
    "adagrad": (1e-2, 1e-1),
    "sgd": (1e-2, 1e-1),
    "momentum": (2e-3, 2e-2),
}
"""Rates at which small nets on standardised data learn well, by optimizer: the least and the largest."""


def usual_rate(dice: Dice, optimizer: str, times: float = 1.0) -> float:
    """A rate at which small nets on standardised data learn well."""
    return times * dice.log(*USUAL_RATES[optimizer])
