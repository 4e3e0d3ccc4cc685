"""Advice about single updates whose numbers are far from those around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from lightning_nanguard import NaNGuard
from tests.helpers import Task, batches, differences, fit, learner_of, mlp


class Odd(Task):
    """Multiplies the loss of one batch."""

    factor, at = 1.0, 12

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = super().training_step(batch, batch_idx) + 4
        return loss * self.factor if batch_idx == self.at else loss


def run(
    folder: Path, guard: NaNGuard | None, *, factor: float = 1.0, rate: float = 1.0, at: int = 12, **options: Any
) -> Any:
    torch.manual_seed(0)
    module = Odd(mlp(), lambda p: SGD(p, lr=1e-3), lambda one: LambdaLR(one, lambda n: rate if n == at else 1.0))
    module.factor, module.at = factor, at
    return fit(module, batches(count=24), guard, folder=folder, **options)


@pytest.mark.parametrize("act_on", ["certain", "evidence"])
@pytest.mark.parametrize("readback", ["step", "deferred"])
@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"factor": 300.0}, ("gradient_spike", "gradient")),
        ({"factor": -1.0}, ("loss_outlier", "loss")),
        ({"rate": 300.0}, ("learning_rate_outlier", "learning rate of group 0")),
        ({"rate": 1e-9}, ("learning_rate_outlier", "learning rate of group 0")),
        ({"rate": 0.0}, None),
        ({}, None),
    ],
    ids=str,
)
def test_an_outlier_is_told_once_and_changes_nothing(
    changed: dict[str, float], told: tuple[str, str] | None, readback: Any, act_on: Any, tmp_path: Path
) -> None:
    """The advice names the update; the run is, bit for bit, the one without the guard."""
    guard = NaNGuard(dirpath=tmp_path, readback=readback, act_on=act_on, preflight=False)
    guarded, bare = run(tmp_path, guard, **changed), run(tmp_path, None, **changed)
    assert differences(learner_of(guarded.trainer, guarded.module), learner_of(bare.trainer, bare.module)) == []
    assert guard.interventions == ()
    assert [(one.finding.cause, one.finding.place) for one in guard.advice] == ([] if told is None else [told])
    assert all("of update 13 was" in one.finding.suggestion for one in guard.advice)


@pytest.mark.parametrize("at", [21, 23])
@pytest.mark.parametrize("readback", ["step", "deferred"])
@pytest.mark.parametrize(
    ("changed", "told"),
    [({"factor": 300.0}, ["gradient_spike"]), ({"rate": 300.0}, ["learning_rate_outlier"]), ({"rate": 1e-3}, [])],
    ids=str,
)
def test_an_outlier_among_the_last_updates(
    changed: dict[str, float], told: list[str], at: int, readback: Any, tmp_path: Path
) -> None:
    """It is told at the end of the run. A rate that falls there is usual."""
    guard = NaNGuard(dirpath=tmp_path, readback=readback, preflight=False)
    run(tmp_path, guard, at=at, **changed)
    assert [one.finding.cause for one in guard.advice] == told
    if "rate" in changed:
        assert all(f"of update {at + 1} was" in one.finding.suggestion for one in guard.advice)


def test_the_loss_of_a_smaller_batch_is_no_outlier(tmp_path: Path) -> None:
    """A sum over samples is far lower in the last batch of an epoch, which is no reason for advice."""

    class Sums(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss: Tensor = super().training_step(batch, batch_idx) + 4
            return loss * len(batch[0])

    torch.manual_seed(0)
    data = batches(count=20)
    data[-1] = data[-1][0][:1], data[-1][1][:1]
    guard = NaNGuard(dirpath=tmp_path, preflight=False)
    fit(Sums(mlp(), lambda p: SGD(p, lr=1e-4)), data, guard, folder=tmp_path, max_epochs=3)
    assert guard.advice == ()


def test_an_overflow_that_a_gradscaler_skips_is_no_outlier(tmp_path: Path) -> None:
    """Overflows are usual with fp16."""
    guard = NaNGuard(dirpath=tmp_path)
    made = run(tmp_path, guard, factor=1e4, precision="16-mixed")
    assert made.trainer.precision_plugin.scaler.get_scale() < 1024.0 * 4**3
    assert guard.interventions == ()
    assert guard.advice == ()


def test_readings_before_a_rollback_are_not_compared(tmp_path: Path) -> None:
    """They belong to another state."""

    class Restored(Odd):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 14:
                next(self.parameters()).data.fill_(float("nan"))
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    module, guard = Restored(mlp(), lambda p: SGD(p, lr=1e-3)), NaNGuard(dirpath=tmp_path)
    module.factor = -1.0
    fit(module, batches(count=24), guard, folder=tmp_path)
    assert guard.interventions
    assert guard.advice == ()


def test_an_average_that_is_larger_than_the_weights_ever_were(tmp_path: Path) -> None:
    """It is told once, and nothing is restored, because other code may have meant it."""

    class Ema(Callback):
        def __init__(self, factor: float) -> None:
            self.factor = factor
            self.ema: dict[str, Tensor] = {}

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            for name, weight in pl_module.named_parameters():
                average = self.ema.setdefault(name, weight.detach().clone())
                average.mul_(0.9).add_(weight.detach(), alpha=0.1)
            if batch_idx == 12:
                next(iter(self.ema.values()))[0, 0] = self.factor

    for factor in (300.0, 0.1):
        guard = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=4)
        run(tmp_path, guard, callbacks=[Ema(factor)])
        assert guard.interventions == ()
        assert [one.finding.cause for one in guard.advice] == (["average_too_large"] if factor > 1 else [])
        assert all("Ema.ema" in one.finding.place for one in guard.advice)


@pytest.mark.parametrize(("row", "every"), [(1e5, 20), (1e5, 1000), (1.0, 20)])
def test_running_statistics_that_a_row_makes_far_larger(row: float, every: int, tmp_path: Path) -> None:
    """With ``act_on="certain"`` it is told once, and nothing changes. It is not told without a snapshot of settled
    statistics to compare with, because data may be large from the start."""
    torch.manual_seed(0)
    data = batches(count=160)
    for index in range(130, 160, 10):
        data[index][0][0] *= row
    module = Task(mlp(norm=True), lambda p: SGD(p, lr=0.05))
    guard = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=every)
    fit(module, data, guard, folder=tmp_path)
    assert guard.interventions == ()
    told = [one.finding.cause for one in guard.advice if one.finding.cause == "statistics_too_large"]
    assert told == (["statistics_too_large"] if row > 1 and every < 160 else [])
