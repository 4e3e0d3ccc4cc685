"""What a seed stands for: a model, how it is trained, and what strikes it once."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import EMAWeightAveraging, WeightAveraging
from torch import Tensor, nn, optim
from torch.optim import lr_scheduler

KINDS = ("loss", "activation", "gradient", "weight", "moment", "buffer")
EPOCHS, BATCHES, SIZE, INPUTS, OUTPUTS = 2, 24, 8, 6, 3


def _one_cycle(optimizer: optim.Optimizer, steps: int) -> Any:
    cycles = "betas" in optimizer.defaults or bool(optimizer.defaults.get("momentum"))
    return lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps + 1, cycle_momentum=cycles)


OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "momentum": partial(optim.SGD, lr=0.02, momentum=0.9),
    "nesterov": partial(optim.SGD, lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-4),
    "adam": partial(optim.Adam, lr=3e-3),
    "adamw": partial(optim.AdamW, lr=3e-3),
    "fused": partial(optim.AdamW, lr=3e-3, fused=True),
    "nadam": partial(optim.NAdam, lr=3e-3),
    "rmsprop": partial(optim.RMSprop, lr=1e-3, momentum=0.5),
    "adagrad": partial(optim.Adagrad, lr=1e-2),
}
SCHEDULES: dict[str, tuple[str, Callable[[optim.Optimizer, int], Any]] | None] = {
    "constant": None,
    "exponential": ("step", lambda optimizer, steps: lr_scheduler.ExponentialLR(optimizer, 0.98)),
    "cosine": ("step", lambda optimizer, steps: lr_scheduler.CosineAnnealingLR(optimizer, steps)),
    "warm up": ("step", lambda optimizer, steps: lr_scheduler.LinearLR(optimizer, 0.1, total_iters=steps // 3)),
    "one cycle": ("step", lambda optimizer, steps: _one_cycle(optimizer, steps)),
    "by epoch": ("epoch", lambda optimizer, steps: lr_scheduler.StepLR(optimizer, 1, 0.5)),
}


class EpochAverage(WeightAveraging):
    """Averages the weights at the end of each epoch."""

    def __init__(self) -> None:
        super().__init__(avg_fn=lambda mean, now, count: mean + 0.5 * (now - mean))

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None


AVERAGES: dict[str, Callable[[], Callback] | None] = {
    "none": None,
    "each update": lambda: EMAWeightAveraging(decay=0.9),
    "each epoch": EpochAverage,
}


def _flipped(value: Tensor) -> None:
    # The highest bit of the exponent: a usual number below two becomes a huge one.
    if value.dtype == torch.bfloat16:
        value.view(torch.int16).bitwise_xor_(1 << 14)
    else:
        value.view(torch.int32).bitwise_xor_(1 << 30)


VALUES: dict[str, Callable[[Tensor], Any]] = {
    "NaN": lambda value: value.fill_(math.nan),
    "Inf": lambda value: value.fill_(math.inf),
    "flip": _flipped,
}


# A loss above two would flip to a tiny one, and a finite activation is squashed by the layers behind it: nobody can
# tell such a fault from a number that belongs there.
_CERTAIN = {"loss": ("NaN", "Inf"), "activation": ("NaN",)}


@dataclass(frozen=True)
class Draw:
    """One run and its fault.

    Attributes:
        seed: Seed of the model, the data and the random streams.
        kind: What is struck.
        value: What becomes of one element of it.
        at: Number of the micro-batch, over all epochs.
        optimizer: Name of the optimizer.
        schedule: Name of the scheduler.
        average: Which average a callback keeps.
        accumulate: Micro-batches of an update.
        dropout: Probability of dropout; 0 for none.
        norm: Whether there is batch norm.
        clip: Largest gradient norm; ``None`` does not clip.
        precision: Of the Trainer.
        every: Updates between the guard's snapshots.
    """

    seed: int
    kind: str
    value: str
    at: int
    optimizer: str
    schedule: str
    average: str
    accumulate: int
    dropout: float
    norm: bool
    clip: float | None
    precision: str
    every: int

    @property
    def steps(self) -> int:
        """Updates of the run."""
        return EPOCHS * math.ceil(BATCHES / self.accumulate)


def draw(seed: int, number: int) -> Draw:
    """The draw of that number."""
    dice = random.Random(f"{seed}/{number}")
    kind = KINDS[number % len(KINDS)]
    accumulate, optimizer = dice.choice([1, 1, 2, 4]), dice.choice(list(OPTIMIZERS))
    return Draw(
        seed=dice.randrange(1 << 30),
        kind=kind,
        value=dice.choice(_CERTAIN.get(kind, tuple(VALUES))),
        # A moment is there once an update was made.
        at=dice.randrange(accumulate, EPOCHS * BATCHES),
        optimizer=optimizer,
        schedule=dice.choice(list(SCHEDULES)),
        average=dice.choice(list(AVERAGES)),
        accumulate=accumulate,
        dropout=dice.choice([0.0, 0.2, 0.5]),
        norm=kind == "buffer" or dice.random() < 0.5,
        clip=None if optimizer == "fused" else dice.choice([None, None, 0.5]),
        precision=dice.choice(["32-true", "32-true", "bf16-mixed"]),
        every=dice.choice([2, 4, 8]),
    )


def network(one: Draw) -> nn.Sequential:
    """Its network."""
    layers = [nn.Linear(INPUTS, 12), *([nn.BatchNorm1d(12)] if one.norm else []), nn.Tanh(), nn.Dropout(one.dropout)]
    return nn.Sequential(*layers, nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, OUTPUTS))
