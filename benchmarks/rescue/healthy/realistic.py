"""Realistic models at their right rate."""

from __future__ import annotations

from benchmarks.rescue.realistic.catalogue import TWINS

from .forms import Dice, Recipe, forms


def _optimizer_last(spec: str) -> str:
    task, optimizer, *words = spec.split("/")
    return "/".join((task, *words, optimizer))


WAYS = {_optimizer_last(form.name.partition(":")[2]): form for form in TWINS}
"""The ways of training by their words, of which the last is the optimizer."""


def draw(dice: Dice, *words: str) -> Recipe:
    """A way of training at 0.7 to 1.2 times the rate of the table."""
    form = WAYS["/".join(words)]
    options = {key: value for key, value in form.options.items() if key not in ("own_task", "heading")}
    return Recipe(form.options["own_task"], (form.rate or 0.0) * dice.uniform(0.7, 1.2), options)


FORMS = forms("realistic", draw, " ".join(WAYS))
