"""What each rank runs of the tests in which ranks try lower rates together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from lightning_nanguard import NaNGuard
from tests.distributed.again import mine
from tests.helpers import Batch, Task

if TYPE_CHECKING:
    from tests.distributed.worker import Worker

UPDATES = 240
GOOD, HIGH = 3e-3, 3.0
FROM = 55


def made(rank: int) -> list[Batch]:
    """Batches of a regression that takes some learning."""
    dice = torch.Generator().manual_seed(rank)
    inputs = torch.randn(UPDATES, 32, 6, generator=dice)
    return [(x, torch.stack([x[:, 0].sin(), x[:, 1] * x[:, 2]], dim=1)) for x in inputs]


class Once(Task):
    """On one rank no batch can be run a second time, from one in the middle of a trial on."""

    seen = -1

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        again, self.seen = batch_idx <= self.seen, max(self.seen, batch_idx)
        if again and mine() == 1 and batch_idx > FROM:
            raise KeyError("no batch comes twice")
        loss: Tensor = super().training_step(batch, batch_idx)
        return loss


def regression(rate: float, kind: Callable[..., Task] = Task) -> Task:
    """The model, from one seed on all ranks."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    return kind(net, partial(AdamW, lr=rate))


def trials(worker: Worker) -> None:
    """A healthy run and a ruined one, bare and guarded, and one whose trials break off."""

    def fit(name: str, rate: float, *, guarded: bool, kind: Callable[..., Task] = Task) -> None:
        folder: Path = worker.folder / "guard"
        guard = NaNGuard(act_on="evidence", dirpath=folder) if guarded else None
        _, module = worker.fit(name, regression(rate, kind), data=made, guard=guard, guarded=guarded)
        losses = [float((module.net(x) - y).square().mean().detach()) for x, y in made(7)[:8]]
        found: dict[str, Any] = worker.results[name]
        found["loss"] = sum(losses) / len(losses)
        found["receipts"] = [] if guard is None else [receipt.verdict for receipt in guard.receipts]

    fit("healthy", GOOD, guarded=True)
    fit("healthy, bare", GOOD, guarded=False)
    fit("ruined", HIGH, guarded=True)
    fit("ruined, bare", HIGH, guarded=False)
    fit("broken off", HIGH, guarded=True, kind=Once)
