"""Which updates are kept to be repeated. That they are repeated bit for bit is in test_updates_again.py."""

from __future__ import annotations

import weakref
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning import callbacks as stock
from torch import nn
from torch.utils.data import DataLoader

from lightning_nanguard import NaNGuard
from lightning_nanguard.thresholds import BatchesThresholds, Thresholds
from lightning_nanguard.thresholds.batches import RepeatedStepsThresholds
from lightning_nanguard.trainer.repeat import kept_updates
from tests.helpers import OUTPUTS, Batch, Task, batches, fit, mlp


class Alive(Callback):
    """Counts the batches that are kept alive."""

    def __init__(self) -> None:
        self.batches: list[weakref.ref[Any]] = []
        self.left = self.most = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(weakref.ref(batch[0]))
        self.left = sum(one() is not None for one in self.batches)
        self.most = max(self.most, self.left)


class Takes(Task):
    """Trains on a batch with more in it than it needs."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch[:2], batch_idx)


class Picture:
    """Holds its pixels where Python cannot look, as those of most libraries do."""

    def __init__(self) -> None:
        self.pixels = array("B", bytes(8))


def with_picture(batch: Batch) -> Any:
    return [*(tensor.clone() for tensor in batch), Picture()]


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("options", [{"collate_fn": with_picture}, {"num_workers": 1}], ids=["pictures", "workers"])
def test_batches_that_may_hold_more_than_is_counted_are_not_kept(options: dict[str, Any], tmp_path: Path) -> None:
    """A picture may be large, and what a worker made holds a file and memory that processes share."""
    alive = Alive()
    data = DataLoader(batches(count=40), batch_size=None, **options)
    fit(Takes(mlp()), data, NaNGuard(), folder=tmp_path, callbacks=[alive])
    assert alive.most < 10


class Remembers(Takes):
    """Keeps its loss with its graph."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.last = super().training_step(batch, batch_idx)
        return self.last


def cloned(batch: Batch) -> Any:
    return [tensor.clone() for tensor in batch]


def test_graphs_that_steps_keep_leave_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of what an attribute's graph holds is not known, whether or not the update before is kept."""
    rooms: list[int] = []
    keep = kept_updates.KeptUpdates.keep

    def noted(self: kept_updates.KeptUpdates, *args: Any) -> None:
        keep(self, *args)
        rooms.append(self._room)

    monkeypatch.setattr(kept_updates.KeptUpdates, "keep", noted)
    fit(Remembers(mlp()), batches(count=20), NaNGuard(), folder=tmp_path)
    assert set(rooms[1:]) == {0}


def test_nothing_is_kept_where_snapshots_are_too_far_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates that the room does not reach back from are of no use, and cost nothing."""
    made: list[int] = []

    class Counted(kept_updates.KeptUpdate):  # type: ignore[misc]
        def __init__(self, number: int, *rest: Any, **named: Any) -> None:
            made.append(number)
            super().__init__(number, *rest, **named)

    monkeypatch.setattr(kept_updates, "KeptUpdate", Counted)
    room = Thresholds(batches=BatchesThresholds(repeated=RepeatedStepsThresholds(updates_again=5)))
    guard = NaNGuard(thresholds=room, snapshot_every_n_steps=20)
    fit(Takes(mlp()), batches(count=100), guard, folder=tmp_path)
    assert made
    assert len(made) < 50


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_averaging_over_an_epoch_does_not_keep_its_batches(tmp_path: Path) -> None:
    """The last pass of stochastic weight averaging is one window of accumulation, which never begins."""
    alive = Alive()
    data = DataLoader(batches(count=40), batch_size=None, collate_fn=cloned)
    swa = stock.StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, OUTPUTS))
    none = Thresholds(batches=BatchesThresholds(repeated=RepeatedStepsThresholds(updates_again=0)))
    guard = NaNGuard(thresholds=none)
    fit(Takes(net), data, guard, folder=tmp_path, callbacks=[swa, alive], max_epochs=2)
    assert len(alive.batches) == 120
    assert alive.left < 20
