"""Every group of thresholds that is given is the one that is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_nanguard import NaNGuard, Thresholds
from tests.helpers import batches, fit, samples, task, with_nan


def groups(of: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """All groups that hold numbers, by their place below the root."""
    for field in fields(of):
        value = getattr(of, field.name)
        if is_dataclass(value):
            yield from groups(value, f"{where}.{field.name}".lstrip("."))
        else:
            yield where, of


class WatchedThresholds:
    """Default thresholds that note which of their groups a number was read from."""

    def __init__(self) -> None:
        self.given = Thresholds()
        self.groups = dict(groups(self.given))
        self.read: set[str] = set()
        for where, group in self.groups.items():
            object.__setattr__(group, "__class__", self._watched(type(group), where))

    def _watched(self, kind: type, where: str) -> type:
        numbers = {field.name for field in fields(kind)}
        read = self.read

        def look(group: Any, name: str) -> Any:
            if name in numbers:
                read.add(where)
            return object.__getattribute__(group, name)

        return type(kind.__name__, (kind,), {"__getattribute__": look})


class RateJumps(Callback):
    """Multiplies the learning rate once, so that the run diverges."""

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        if index == 60:
            trainer.optimizers[0].param_groups[0]["lr"] *= 1000


def no_updates(parameters: list[nn.Parameter]) -> Optimizer:
    """SGD that changes nothing."""
    return torch.optim.SGD(parameters, lr=0.0)


# What these fits have no occasion to read.
ELSEWHERE = {
    "distributed",  # several processes
    "snapshots.placement",  # a device
    "diagnosis.labels",  # class labels
    "diagnosis.blame",  # `decision.blame` stands in its place
}


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Groups that were read in three fits: bad batches, a rate that is too high, and a loss that stands still."""
    watched = WatchedThresholds()
    folder = tmp_path_factory.mktemp("thresholds")
    common: dict[str, Any] = {
        "snapshot_every_n_steps": 5,
        "thresholds": watched.given,
        "preflight": True,
        "act_on": "evidence",
    }
    data = batches(count=90)
    bad = [with_nan(batch) if index in (40, 70) else batch for index, batch in enumerate(data)]
    guard = NaNGuard(dirpath=folder / "bad", bundle_dir=folder / "bundles", readback="deferred", **common)
    fit(task(), bad, guard, folder=folder)
    fit(task(), data, NaNGuard(dirpath=folder / "rate", **common), callbacks=[RateJumps()], folder=folder)
    still = NaNGuard(dirpath=folder / "still", examine_after=16, **common)
    fit(task(optimizer=no_updates), DataLoader(samples(data[:40]), batch_size=8), still, folder=folder)
    return watched.read


def test_every_group_is_read(read: set[str]) -> None:
    """None of them is replaced by a default on its way."""
    unread = dict(groups(Thresholds())).keys() - read - ELSEWHERE
    assert not unread
