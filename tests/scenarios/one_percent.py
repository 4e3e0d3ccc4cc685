"""Data of which one sample in a hundred is bad, in the four ways samples are bad most often, and a model for them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from lightning_nanguard import NaNGuard, SkipStep
from lightning_nanguard.act.defaults import default_remedies
from lightning_nanguard.record.bad_samples import BAD_SAMPLES_FILE, BadSample, read_bad_samples
from tests.helpers import folder_of

Sample = tuple[Tensor, Tensor]
COUNT = 1024


def clean(count: int = COUNT, seed: int = 0) -> list[Sample]:
    """Positive targets, whose logarithm is linear in the inputs."""
    source = torch.Generator().manual_seed(seed)
    weights = torch.randn(8, generator=torch.Generator().manual_seed(77)) / 4
    return [(x, (x @ weights).exp()) for x in torch.randn(count, 8, generator=source)]


KINDS = ("nan input", "inf input", "far input", "negative target", "nan target")
BAD = {row: KINDS[number % 5] for number, row in enumerate(range(37, COUNT, 100))}
NOT_FINITE = {row for row, kind in BAD.items() if kind in ("nan input", "inf input", "nan target")}


def spoilt() -> list[Sample]:
    """The same with one bad sample in a hundred."""
    made = clean()
    for row, kind in BAD.items():
        x, y = (part.clone() for part in made[row])
        if kind == "nan input":
            x[3] = math.nan
        elif kind == "inf input":
            x[:] = math.inf
        elif kind == "far input":
            x[5] = 1e15
        else:
            y.fill_(-1.0 if kind == "negative target" else math.nan)
        made[row] = (x, y)
    return made


class Stream(IterableDataset[Sample]):
    """The samples one after the other."""

    def __init__(self, data: Sequence[Sample]) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.data)


class LogModel(LightningModule):
    """Learns the logarithm of the target."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.net(x)[:, 0] - y.log()).square().mean()

    def training_step(self, batch: Sample, index: int) -> Tensor:
        return self.loss(*batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)

    def held_out(self) -> float:
        """Loss on good samples that were not trained on."""
        x, y = (torch.stack(part) for part in zip(*clean(512, seed=1), strict=True))
        with torch.no_grad():
            return float(self.loss(x, y))


def guard_of(folder: Path, *, keep: bool = False, quarantine: bool = True) -> NaNGuard:
    """A guard with the options for bad samples."""
    remedies = [SkipStep(keep_good_samples=keep), *default_remedies()]
    return NaNGuard(dirpath=folder, quarantine=quarantine, remedies=remedies)


def met(guard: NaNGuard, epoch: int | None = None) -> list[BadSample]:
    """The bad samples that a run has written down, in one epoch or in all."""
    found = read_bad_samples(folder_of(guard) / BAD_SAMPLES_FILE)
    return [one for one in found if epoch is None or one.epoch == epoch]
