"""A problem: a module, its data, what is wrong with it, and what a diagnosis should say of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from benchmarks.rescue import data as sets

Pair = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Net(pl.LightningModule):
    """A net and a loss of it; ``loss_of(net, x, y)``."""

    def __init__(self, net: nn.Module, loss_of: Loss, make: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.net, self.loss_of, self._make = net, loss_of, make

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = (batch["input"], batch["label"]) if isinstance(batch, Mapping) else batch
        loss = self.loss_of(self.net, x, y)
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(x))
        return loss

    def configure_optimizers(self) -> Any:
        return self._make(self.net)


@dataclass
class Problem:
    """One run.

    Attributes:
        module: What is trained.
        batches: The batches, in their order; they are run through again from the start where more are needed.
        cause: What is wrong, ``""`` for a healthy run.
        place: A pattern of the place that a diagnosis should name, ``""`` for a cause that has none.
        samples: The samples it should name; ``None`` where there are none to name.
        steps: Updates of the run.
        look: How it is found: at an intervention, by an examination of a loss that does not move, before the run, or
            before it by the check that compares gradients on request.
        patience: Updates after which a loss that has not moved is examined; by default all but 24 of the run.
        disturb: Called before each update with its number, the module and the optimizer.
        options: Of the Trainer.
    """

    module: Net
    batches: list[Any]
    cause: str
    place: str = ""
    samples: tuple[int, ...] | None = None
    steps: int = 0
    look: Literal["fit", "examine", "preflight", "check"] = "fit"
    patience: int | None = None
    disturb: Callable[[int, nn.Module, Optimizer], None] | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """A kind of problem, of which a seed makes one."""

    cause: str
    name: str
    make: Callable[[Dice], Problem]

    def draw(self, seed: int) -> Problem:
        """The problem that ``seed`` stands for; torch's random stream begins anew."""
        torch.manual_seed(seed)
        return self.make(Dice(f"{self.cause}/{self.name} {seed}"))


class Dice(random.Random):
    """Chance, and what problems are made of by chance."""

    def near(self, value: float, spread: float = 1.5) -> float:
        """A number around ``value``."""
        return float(value * spread ** self.uniform(-1, 1))

    def act(self) -> nn.Module:
        """An activation."""
        return self.choice([nn.ReLU, nn.Tanh, nn.GELU, nn.ELU])()

    def mlp(self, inputs: int, outputs: int, *, norm: bool | None = None, dropout: bool = True) -> nn.Sequential:
        """One to three hidden layers of 16 to 48 units, some with batch norm or dropout."""
        width = self.choice([16, 24, 32, 48])
        layers: list[nn.Module] = []
        for _ in range(self.randint(1, 3)):
            layers.append(nn.Linear(inputs, width))
            if self.random() < 0.3 if norm is None else norm:
                layers.append(nn.BatchNorm1d(width))
            layers.append(self.act())
            if dropout and self.random() < 0.3:
                layers.append(nn.Dropout(0.2))
            inputs = width
        return nn.Sequential(*layers, nn.Linear(inputs, outputs))

    def optimizer(self, *names: str) -> Callable[[nn.Module], Optimizer]:
        """An optimizer at a rate that is good for what is built here."""
        name = self.choice(names or ("sgd", "momentum", "adam", "adamw"))
        factor = self.near(1.0)
        return lambda net: optimizer(name, net, factor)

    def regression(self, steps: int, features: int = 8, outputs: int = 2, size: int | None = None) -> list[Pair]:
        """Batches of a smooth function of Gaussian inputs."""
        size = size or self.choice([16, 24, 32])
        slope = torch.randn(features, outputs) / features**0.5
        found = []
        for _ in range(steps):
            x = torch.randn(size, features)
            found.append((x, torch.tanh(x @ slope) + 0.1 * torch.randn(size, outputs)))
        return found

    def digits(self, steps: int, size: int | None = None) -> list[Pair]:
        """Batches of digits, 64 pixels in −1…1 and ten classes."""
        x, y = sets.digits().train
        size = size or self.choice([16, 32, 48])
        order = torch.cat([torch.randperm(len(x)) for _ in range(steps * size // len(x) + 1)])
        return [(x[rows].clone(), y[rows].clone()) for rows in islice(order.split(size), steps)]

    def some(self, size: int, most: int = 4) -> tuple[int, ...]:
        """A few samples of a batch."""
        return tuple(sorted(self.sample(range(size), self.randint(1, most))))


def optimizer(name: str, net: nn.Module, factor: float = 1.0) -> Optimizer:
    """An optimizer by its name, at a usual rate times ``factor``."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    match name:
        case "sgd":
            return optim.SGD(parameters, 0.05 * factor)
        case "momentum":
            return optim.SGD(parameters, 0.01 * factor, momentum=0.9)
        case "adam":
            return optim.Adam(parameters, 2e-3 * factor)
        case "adamw":
            return optim.AdamW(parameters, 2e-3 * factor)
    raise ValueError(f"no optimizer is named {name!r}")


@contextmanager
def alone() -> Iterator[None]:
    """Keep what is drawn inside from the streams outside."""
    with torch.random.fork_rng(devices=[]):
        yield
