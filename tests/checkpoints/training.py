"""A small run with a schedule, and the checkpoints it leaves, for the tests of this room."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import LearningRateMonitor
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from lightning_nanguard import NaNGuard
from tests.helpers import ONCE, OUTPUTS, MemoryLogger, Positioned, Task, batches, task, trainer_for
from tests.modules import Rates

PER_EPOCH = 12
EPOCHS = 4


class Net(nn.Module):
    """Batch norm and a causal mask of −inf, which is no poison and must stay in every file."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.two = nn.Linear(8, OUTPUTS)
        self.register_buffer("mask", torch.full((8, 8), -math.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.one(x)))
        return self.two(hidden + 0 * torch.relu(self.mask).sum())


def cosine_task() -> Task:
    return task(optimizer=lambda p: AdamW(p, lr=0.01), scheduler=lambda o: CosineAnnealingLR(o, PER_EPOCH * EPOCHS))


def guard_with(**options: Any) -> NaNGuard:
    return NaNGuard(**{"snapshot_every_n_steps": 3, "thresholds": ONCE, **options})


def train(
    guard: NaNGuard | None, *callbacks: Callback, resume: Path | None = None, epochs: int = EPOCHS, **options: Any
) -> tuple[Trainer, Task, list[float], MemoryLogger]:
    """Train a task on a cosine; gives the rates that the steps used as well."""
    module = cosine_task()
    rates = Rates()
    trainer = trainer_for(None, guard, [*callbacks, rates, LearningRateMonitor("step")], max_epochs=epochs, **options)
    trainer.limit_val_batches = 0
    val = DataLoader(batches(count=1), batch_size=None)
    trainer.fit(module, Positioned(batches(count=PER_EPOCH)), val, ckpt_path=resume)
    assert isinstance(trainer.logger, MemoryLogger)
    return trainer, module, rates.used, trainer.logger


# ------------------------------------------------------------------------------------------------- spoiling files


def poison(path: Path, part: str = "weight") -> None:
    content = torch.load(path, weights_only=True)
    if part == "weight":
        content["state_dict"]["net.0.weight"][0, 0] = math.nan
    else:
        content["optimizer_states"][0]["state"][2]["exp_avg_sq"][0, 0] = math.inf
    torch.save(content, path)


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def hole(path: Path) -> None:
    data = bytearray(path.read_bytes())
    middle = data.index(b"data/0") + 200
    data[middle : middle + 16] = b"\0" * 16
    path.write_bytes(data)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weight": (poison, r"state_dict: net\.0\.weight is not finite"),
    "moment": (lambda path: poison(path, "moment"), r"exp_avg_sq of parameter 2 is not finite"),
    "cut short": (cut, "it is cut short, or is not a checkpoint"),
    "empty": (lambda path: path.write_bytes(b""), "it is cut short, or is not a checkpoint"),
    "hole": (hole, "does not match its checksum"),
}
"""How a checkpoint goes bad, and what is said of it."""
