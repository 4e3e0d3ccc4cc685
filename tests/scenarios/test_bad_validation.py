"""A validation loss that is not finite: bad state is put back, and bad data are named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import EarlyStopping

from lightning_nanguard import (
    NaNGuard,
)
from tests.helpers import (
    Batch,
    Task,
    data_for,
    fit,
    mlp,
    task,
    with_nan,
    words,
)
from tests.scenarios.struck import NAN, adam, assert_sound


class SpoilsBeforeValidation(Callback):
    """Poisons batch norm's statistics in the last batch before a validation: training does not look at them."""

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            with torch.no_grad():
                pl_module.net[1].running_var[0] = NAN


def test_bad_validation_loss_under_healthy_training(tmp_path: Path) -> None:
    """A validation loss that is not finite while training is leads to the poisoned buffer. The updates are made
    again without it."""
    guard = NaNGuard(snapshot_every_n_steps=5)
    run = fit(
        task("norm", adam),
        data_for("norm", 20),
        guard,
        folder=tmp_path,
        val=data_for("norm", 2, seed=5),
        max_epochs=3,
        callbacks=[SpoilsBeforeValidation()],
    )
    assert_sound(run, guard)
    (found,) = guard.interventions
    assert (found.fault, found.place) == ("non_finite_validation", "buffer net.1.running_var")
    assert (found.remedies, found.updates_lost) == (("restore", "redo"), 0)
    assert (found.epoch, found.batch_idx) == (1, -1)
    assert math.isfinite(float(run.trainer.callback_metrics["val_loss"]))


def test_restore_in_validation_keeps_the_epochs_means(tmp_path: Path) -> None:
    """The training batches before a bad validation were healthy: the epoch's mean still counts them all."""
    means = []
    for guard in (None, NaNGuard(snapshot_every_n_steps=5)):
        callbacks = [SpoilsBeforeValidation()] if guard is not None else []
        options = {"val": data_for("norm", 2, seed=5), "max_epochs": 2, "folder": tmp_path, "callbacks": callbacks}
        run = fit(task("norm", adam), data_for("norm", 20), guard, **options)
        means.append(float(run.trainer.callback_metrics["loss_epoch"]))
        if guard is not None:
            assert words(guard) == [("restore", "redo")]
    assert means[0] == means[1]


def test_validation_data_that_is_bad_is_no_fault_of_the_state(tmp_path: Path) -> None:
    """A corrupt validation sample gives a non-finite validation loss at every epoch; the run is not rolled back for it
    until the budget is gone, nor is its rate cut."""
    guard = NaNGuard(snapshot_every_n_steps=5)
    val = [with_nan(batch) for batch in data_for("norm", 2, seed=5)]
    run = fit(task("norm", adam), data_for("norm", 5), guard, folder=tmp_path, val=val, max_epochs=30)
    assert run.trainer.global_step == 150
    assert guard.lr_multiplier == 1.0
    losses = [row["loss_epoch"] for _, row in run.logger.rows if "loss_epoch" in row]
    assert losses[-1] < 0.5 * losses[0], "the rollbacks kept it from learning"


class Scored(Task):
    """Logs its validation loss by a name of its own and returns nothing."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.loss(batch, "score")


def test_a_followed_metric_is_watched_by_any_name(tmp_path: Path) -> None:
    """What EarlyStopping monitors is not finite: it is on record before the callback stops the run for it."""
    guard = NaNGuard()
    val = [with_nan(batch) for batch in data_for("norm", 2, seed=5)]
    stops = EarlyStopping("score", check_finite=True)
    run = fit(
        Scored(mlp(norm=True), adam),
        data_for("norm", 5),
        guard,
        folder=tmp_path,
        val=val,
        max_epochs=3,
        callbacks=[stops],
    )
    assert run.trainer.current_epoch == 1
    (found,) = guard.interventions
    assert (found.fault, found.place, found.remedies) == ("non_finite_validation", "score", ())
