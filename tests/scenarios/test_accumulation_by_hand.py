"""Manual optimization that makes one update from several batches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_nanguard import NaNGuard
from tests.helpers import Task, batches, differences, fit, learner_of, mlp, with_nan, words

WINDOW, COUNT = 4, 24


class Accumulates(Task):
    """Steps in every fourth batch, and logs the loss of each batch.

    Args:
        without: The batches that it leaves out itself.
        norm: Whether it has batch norm.
    """

    def __init__(self, without: tuple[int, ...] = (), *, norm: bool = True) -> None:
        torch.manual_seed(0)
        super().__init__(mlp(norm=norm))
        self.automatic_optimization = False
        self.without = without

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        if batch_idx not in self.without:
            loss = self.loss_of(batch)
            self.manual_backward(loss / WINDOW)
            self.log("loss", loss, on_epoch=True, on_step=False)
        if (batch_idx + 1) % WINDOW == 0:
            optimizer.step()
            optimizer.zero_grad()

    def loss_of(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.net(x) - y).square().mean()


@pytest.mark.parametrize("bad", [(), (4,), (5, 6, 13, 20)])
def test_a_bad_batch_is_left_out_of_its_window(bad: tuple[int, ...], tmp_path: Path) -> None:
    """The batch whose loss is NaN is named. Weights, statistics and logged means are as if it had not been there."""
    data = [with_nan(batch) if index in bad else batch for index, batch in enumerate(batches(count=COUNT))]
    alone = fit(Accumulates(bad), data, folder=tmp_path / "alone")
    guard = NaNGuard()
    run = fit(Accumulates(), data, guard, folder=tmp_path)

    assert not differences(learner_of(alone.trainer, alone.module), learner_of(run.trainer, run.module))
    assert differences(alone.trainer.callback_metrics["loss"], run.trainer.callback_metrics["loss"]) == []
    assert math.isfinite(float(run.trainer.callback_metrics["loss"]))
    assert words(guard) == [("leave out",)] * len(bad)
    assert [one.batch_idx for one in guard.interventions] == list(bad)
    assert {(one.fault, one.cause) for one in guard.interventions} <= {("non_finite_loss", "non_finite_input")}
    assert [one.global_step for one in guard.interventions] == [index // WINDOW + 1 for index in bad]


class StepsIfFinite(Accumulates):
    """Clears the gradients of a batch with a bad loss itself, and counts such batches."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss_of(batch)
        self.manual_backward(loss)
        if not bool(torch.isfinite(loss)):
            self.log("bad", 1.0, on_epoch=True, on_step=False, reduce_fx="sum")
            optimizer.zero_grad()
            return
        optimizer.step()


def test_a_batch_that_the_user_handles_is_left_alone(tmp_path: Path) -> None:
    """If the user's code has removed the bad gradients, nothing is undone and nothing is recorded."""
    data = [with_nan(batch) if index in (3, 9) else batch for index, batch in enumerate(batches(count=COUNT))]
    alone = fit(StepsIfFinite(norm=False), data, folder=tmp_path / "alone")
    guard = NaNGuard()
    run = fit(StepsIfFinite(norm=False), data, guard, folder=tmp_path)
    assert not differences(learner_of(alone.trainer, alone.module), learner_of(run.trainer, run.module))
    assert float(run.trainer.callback_metrics["bad"]) == 2.0
    assert words(guard) == []


def test_bad_weights_are_not_blamed_on_a_batch(tmp_path: Path) -> None:
    """If a weight is bad, no batch is left out: the run goes back at the next update."""

    class LosesWeight(Accumulates):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 13:
                next(self.net.parameters()).data.view(-1)[0] = math.nan

    guard = NaNGuard(snapshot_every_n_steps=1)
    run = fit(LosesWeight(), batches(count=COUNT), guard, folder=tmp_path)
    assert [one.remedies for one in guard.interventions] == [("restore",)]
    assert [one.batch_idx for one in guard.interventions] == [15]
    assert all(bool(one.isfinite().all()) for one in run.module.parameters())
