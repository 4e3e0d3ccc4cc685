"""Layers that change their size in mid-run, and restores that do not restore."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_nanguard import NaNGuard, TrainingDivergedError
from tests.helpers import ONCE, batches, differences, trainer_for


class Resized(LightningModule):
    """The hidden layer shrinks at one batch, grows at another, and a weight is lost at a third."""

    def __init__(
        self, resize: dict[int, int], lost: int | None = None, everything: bool = False, factor: float = 1.0
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        self.resize, self.lost, self.everything, self.factor = resize, lost, everything, factor

    @torch.no_grad()
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        first, last = self.net[0], self.net[2]
        if batch_idx in self.resize:
            width = self.resize[batch_idx]
            first.weight.set_(torch.cat([first.weight, first.weight])[:width].clone())
            first.bias.set_(torch.cat([first.bias, first.bias])[:width].clone())
            last.weight.set_(torch.cat([last.weight, last.weight], 1)[:, :width] * self.factor)
        if batch_idx == self.lost:
            first.weight[: None if self.everything else 1] = math.nan

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), 0.02)


def run(module: Resized, guard: NaNGuard | None = None) -> Resized:
    trainer_for(None, guard).fit(module, DataLoader(batches(count=40), batch_size=None))
    return module


@pytest.mark.parametrize("readback", ["step", "deferred"])
@pytest.mark.parametrize("resize", [{9: 6}, {9: 12}, {9: 6, 11: 8}, {0: 6}, {30: 6}])
def test_a_weight_lost_after_a_resize_comes_back(resize: dict[int, int], readback: Any, tmp_path: Path) -> None:
    """There is a snapshot of the new shape at once: the weights come back, in it, with a few updates lost."""
    guard = NaNGuard(dirpath=tmp_path, readback=readback)
    lost = max(resize) + 3
    module = run(Resized(resize, lost), guard)
    assert [one.remedies for one in guard.interventions] == [("restore", "redo")]
    assert guard.interventions[0].updates_lost <= 5
    assert len(module.net[0].bias) == resize[max(resize)]
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())


@pytest.mark.parametrize("act_on", ["certain", "evidence"])
@pytest.mark.parametrize("readback", ["step", "deferred"])
def test_a_loss_that_a_resize_raised_delays_no_snapshot(readback: Any, act_on: Any, tmp_path: Path) -> None:
    """The new snapshot is certified although the loss is above that of the untrained model."""
    guard = NaNGuard(dirpath=tmp_path, readback=readback, act_on=act_on)
    module = run(Resized({9: 6}, lost=12, factor=-4.0), guard)
    assert [one.remedies for one in guard.interventions] == [("restore", "redo")]
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())


def test_a_healthy_resize_is_left_alone(tmp_path: Path) -> None:
    """The same bits as without the guard."""
    guard = NaNGuard(dirpath=tmp_path)
    resize = {5: 6, 15: 12}
    guarded, bare = run(Resized(resize), guard).state_dict(), run(Resized(resize)).state_dict()
    assert list(guard.interventions) == []
    assert differences(guarded, bare) == []


def test_a_restore_that_restores_nothing_is_said_and_not_repeated(tmp_path: Path) -> None:
    """Where a layer is lost as it changes its size, no snapshot holds it: the run ends at once, and says so."""
    guard = NaNGuard(dirpath=tmp_path)
    module = Resized({9: 6}, lost=9, everything=True)
    with pytest.raises(TrainingDivergedError, match=r"parameter net\.0\.weight is still not finite") as error:
        run(module, guard)
    assert "no good state to go back to" in str(error.value)
    assert "holds the weights of step" not in str(error.value)
    assert [one.remedies for one in guard.interventions] == [("restore",)]
    assert guard.interventions[0].snapshot_step is None


def test_what_is_left_as_it_is_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A frozen layer that changed its size is not seen at once; a restore names it and puts the rest back."""

    class Frozen(Resized):
        def __init__(self) -> None:
            super().__init__({}, lost=9)
            self.register_buffer("table", torch.zeros(4))

        @torch.no_grad()
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(batch, batch_idx)
            if batch_idx == 7:
                self.table = torch.ones(6)

    guard = NaNGuard(thresholds=ONCE, dirpath=tmp_path, snapshot_every_n_steps=40)
    module = run(Frozen(), guard)
    assert "the rollback did not restore buffer table, because the shape has changed" in caplog.text
    assert [one.remedies for one in guard.interventions] == [("restore",)]
    assert module.table.tolist() == [1.0] * 6
