"""Data that come in an order: the loss rises and falls with the data, and all is well."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.rescue import data
from benchmarks.rescue.data import Batch, Split
from benchmarks.rescue.models import Task, Transformer, cross_entropy, mlp, next_token, squared

from .forms import Dice, Recipe, forms, usual_rate

INPUTS = 12


class Rows:
    """A regression problem, and ``total`` rows of it from which the order is made."""

    def __init__(self, dice: Dice, total: int) -> None:
        self.dice, self.g, self.total = dice, dice.rows(), total
        self.x = torch.randn(total, INPUTS, generator=self.g)
        self.teacher = self._weights()
        self.bend = self._weights()
        self.z = self.answer(self.x)
        self.place = torch.arange(total) / total

    def _weights(self) -> Tensor:
        return torch.randn(INPUTS, generator=self.g) / INPUTS**0.5

    def answer(self, x: Tensor) -> Tensor:
        """What the teacher says, without noise."""
        return x @ self.teacher + torch.tanh(2 * x @ self.bend)

    def other_teacher(self) -> Tensor:
        """The answers of another, linear teacher."""
        return self.x @ self._weights() * 1.5

    def noise(self) -> Tensor:
        return torch.randn(self.total, generator=self.g)

    def blocks(self, count: int) -> Tensor:
        """Number of the block in which each row lies."""
        return (self.place * count).long()


def sorted_targets(rows: Rows) -> Batch:
    """From the smallest target to the largest."""
    order = rows.z.argsort(descending=rows.dice.random() < 0.5)
    return rows.x[order], rows.z[order]


def blocks(rows: Rows) -> Batch:
    """Blocks of another scale and mean."""
    block = rows.blocks(rows.dice.randint(2, 6))
    return rows.x, rows.z * (1 + rows.dice.uniform(0.5, 2.5) * block) + rows.dice.uniform(0, 2) * block


def harder(rows: Rows) -> Batch:
    """From the middle on the targets are larger, or noisy."""
    late = rows.place > rows.dice.uniform(0.3, 0.7)
    if rows.dice.random() < 0.5:
        return rows.x, torch.where(late, 4 * rows.z.sign() * rows.z.abs().sqrt(), rows.z)
    return rows.x, rows.z + torch.where(late, rows.dice.uniform(1, 3) * rows.noise(), 0.0)


def seasons(rows: Rows) -> Batch:
    """Mean and amplitude swing with a period of their own."""
    phase = 2 * math.pi * rows.dice.uniform(1.5, 6) * rows.place
    height, swing = rows.dice.uniform(0.5, 4), rows.dice.uniform(0, 0.9)
    return rows.x, rows.z * (1 + swing * phase.cos()) + height * phase.sin()


def trend(rows: Rows) -> Batch:
    """The target's mean grows from row to row."""
    return rows.x, rows.z + rows.dice.uniform(2, 10) * rows.place


def domains(rows: Rows) -> Batch:
    """One teacher after another."""
    count = rows.dice.randint(2, 4)
    answers = torch.stack([rows.other_teacher() for _ in range(count)])
    return rows.x, answers.gather(0, rows.blocks(count)[None])[0]


def in_turn(rows: Rows) -> Batch:
    """Two teachers, who change several times a pass."""
    day = rows.blocks(rows.dice.randint(6, 16)) % 2 == 0
    return rows.x, torch.where(day, rows.z, rows.other_teacher())


def shifted(rows: Rows) -> Batch:
    """Inputs far from those before, in blocks."""
    block = rows.blocks(rows.dice.randint(3, 6))
    x = rows.x + rows.dice.uniform(1, 3) * torch.randn(6, INPUTS, generator=rows.g)[block]
    return x, rows.answer(x)


def by_size(rows: Rows) -> Batch:
    """From small inputs to large ones."""
    x = rows.x * (0.2 + rows.dice.uniform(1, 4) * rows.place)[:, None]
    return x, rows.answer(x) * rows.dice.uniform(0.5, 1.5)


def curriculum(rows: Rows) -> Batch:
    """Noise that grows over the whole run, in steps."""
    level = rows.blocks(rows.dice.randint(3, 6)) / 3
    return rows.x, rows.z + level * rows.noise()


def noisy_blocks(rows: Rows) -> Batch:
    """Every few blocks one whose targets are noise."""
    bad = rows.blocks(rows.dice.randint(6, 12)) % 4 == 3
    return rows.x, torch.where(bad, rows.dice.uniform(1, 4) * rows.noise(), rows.z)


ORDERS: dict[str, Callable[[Rows], Batch]] = {
    "sorted": sorted_targets,
    "blocks": blocks,
    "harder": harder,
    "seasons": seasons,
    "trend": trend,
    "domains": domains,
    "in_turn": in_turn,
    "shifted": shifted,
    "by_size": by_size,
    "curriculum": curriculum,
    "noisy_blocks": noisy_blocks,
}


def held_out(tensors: Batch) -> Split:
    """Every tenth row is held out, so that what is held out holds all of the order."""
    keep = torch.arange(len(tensors[0])) % 10 != 9
    return Split(tuple(t[keep] for t in tensors), tuple(t[~keep] for t in tensors))


def draw(dice: Dice, order: str, passes: str, optimizer: str) -> Recipe:
    """A regression on rows in order: ``once`` over all of them, or ``epochs`` of 12 to 40 batches each."""
    size = dice.choice((16, 32))
    steps = int(dice.log(200, 480))
    batches = steps if passes == "once" else dice.randint(12, 40)
    split = held_out(ORDERS[order](Rows(dice, size * batches * 10 // 9 + 10)))
    width = dice.choice((24, 48, 64))
    task = Task(lambda: split, lambda: mlp(INPUTS, width, 1), squared, batch=size, steps=steps, shuffle=False)
    schedule = dice.choice(("constant", "constant", "cosine"))
    return Recipe(task, usual_rate(dice, optimizer), {"schedule": schedule})


def draw_classes(dice: Dice, _: str, passes: str, optimizer: str) -> Recipe:
    """Digits sorted by class in every epoch, or class after class joining over the run (``once``)."""
    (x, y), g = data.digits().train, dice.rows()
    steps, size = int(dice.log(200, 400)), 32
    if passes == "once":
        known = 2 + (torch.arange(steps * size) / (steps * size) * 9).long().clamp_max(8)
        wanted = (torch.rand(steps * size, generator=g) * known).long()
        places = [(y == digit).nonzero()[:, 0] for digit in range(10)]
        chosen = (torch.rand(steps * size, generator=g) * min(len(p) for p in places)).long()
        rows = torch.stack([p[: min(len(q) for q in places)] for p in places])[wanted, chosen]
    else:
        rows = y.argsort(stable=True)[torch.arange(0, len(y), dice.randint(1, 3))]
    split = Split((x[rows], y[rows]), data.digits().held)
    task = Task(lambda: split, lambda: mlp(64, 32, 10), cross_entropy, batch=size, steps=steps, shuffle=False)
    return Recipe(task, usual_rate(dice, optimizer))


def draw_tongues(dice: Dice, _: str, passes: str, optimizer: str) -> Recipe:
    """A language model on sentences of one language after another."""
    g, steps, size = dice.rows(), int(dice.log(160, 300)), 16
    batches = steps if passes == "once" else dice.randint(12, 30)
    total, count = size * batches * 10 // 9 + 10, dice.randint(2, 3)
    tongue = torch.arange(total) * count // total
    chains = torch.softmax(dice.uniform(1, 4) * torch.randn(count, 12, 12, generator=g), -1)
    words = [torch.randint(12, (total,), generator=g)]
    for _ in range(12):
        words.append(torch.multinomial(chains[tongue, words[-1]], 1, generator=g)[:, 0])
    split = held_out((torch.stack(words, 1),))
    task = Task(lambda: split, Transformer, next_token, batch=size, steps=steps, shuffle=False)
    return Recipe(task, usual_rate(dice, optimizer))


FORMS = (
    *forms("order", draw, """sorted/epochs/adamw sorted/epochs/sgd sorted/once/adam blocks/epochs/adamw
           blocks/epochs/momentum harder/epochs/adamw harder/epochs/sgd harder/once/adam seasons/epochs/rmsprop
           seasons/once/adam trend/epochs/adam trend/once/sgd domains/once/adam domains/epochs/adamw
           domains/epochs/momentum in_turn/epochs/adam in_turn/once/sgd shifted/epochs/adam shifted/once/momentum
           by_size/epochs/adamw by_size/once/adam curriculum/once/adamw curriculum/once/sgd
           noisy_blocks/epochs/adam""", -0.5),
    *forms("order", draw_classes, """classes/epochs/adam classes/epochs/momentum classes/once/adamw
           classes/once/sgd""", -0.5),
    *forms("order", draw_tongues, "tongues/epochs/adam tongues/once/adamw", -0.5),
)  # fmt: skip
"""What is held out holds all of the order, and a run that ends in one part of it may have forgotten the others."""
