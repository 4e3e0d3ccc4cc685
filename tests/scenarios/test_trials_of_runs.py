"""Runs whose copies can make their updates are saved by a trial, whatever surrounds the step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_nanguard import NaNGuard

TEACHER = torch.randn(32, 10, generator=torch.Generator().manual_seed(3))


class Stream(IterableDataset[Any]):
    """Batches without a known number."""

    def __iter__(self) -> Iterator[Any]:
        draws = torch.Generator().manual_seed(7)
        for _ in range(220):
            x = torch.randn(32, 32, generator=draws)
            yield x, (x @ TEACHER).argmax(1)


class Ruined(LightningModule):
    """A ReLU network at a rate at which it dies."""

    def __init__(self, lr: float = 0.5) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.losses: list[float] = []

    def scores(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.scores(batch[0]), batch[1])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.net.parameters() if p.requires_grad], self.lr)


class Carries(Ruined):
    """Its hidden state goes from batch to batch as a plain attribute."""

    def __init__(self, lr: float = 0.5) -> None:
        super().__init__(lr)
        self.hidden = torch.zeros(32, 64)

    def scores(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.net[0](x) + 0.5 * self.hidden)
        self.hidden = hidden.detach()
        out: Tensor = self.net[1:](hidden)
        return out


class Averages(Ruined):
    """A hook averages its weights into a copy that the loss does not use."""

    def __init__(self, lr: float = 0.5) -> None:
        super().__init__(lr)
        self.mean = copy.deepcopy(self.net)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        with torch.no_grad():
            for mean, weight in zip(self.mean.parameters(), self.net.parameters(), strict=True):
                mean.lerp_(weight, 0.1)


@pytest.mark.parametrize("module", [Ruined, Carries, Averages])
def test_a_stream_at_a_rate_that_ruins_is_saved(module: type[Ruined], tmp_path: Path) -> None:
    """A trial finds a lower rate if the number of batches is unknown, and with a carried state or an averaged copy."""
    seed_everything(1)
    guard, net = NaNGuard(act_on="evidence"), module()
    trainer = Trainer(
        default_root_dir=tmp_path,
        max_epochs=1,
        callbacks=[guard],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, DataLoader(Stream(), batch_size=None))
    assert [one.remedies[0] for one in guard.interventions][:1] == ["restore"]
    assert sum(net.losses[-20:]) / 20 < 1.6
