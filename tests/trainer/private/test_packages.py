"""Both packages of Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
from pytorch_lightning import Callback, LightningModule, Trainer

from lightning_nanguard.trainer.private.packages import GuardCallback, logged_at, logs_every, package_of
from tests.helpers import batches, fit, task, trainer_for


def test_a_callback_of_both_packages() -> None:
    """LightningCLI of either package takes the guard, and each class is told to its package."""
    assert issubclass(GuardCallback, Callback)
    assert package_of(LightningModule) is pytorch_lightning
    assert package_of(None) is pytorch_lightning
    lightning = pytest.importorskip("lightning.pytorch")
    assert issubclass(GuardCallback, lightning.Callback)
    assert package_of(lightning.LightningModule) is lightning


def test_the_step_loggers_are_told() -> None:
    """It is the number of batches that stepped, as Lightning logs it; ``global_step`` where that is gone."""
    seen: list[int] = []

    class Notes(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            seen.append(logged_at(trainer))

    run = fit(task(), batches(count=4), callbacks=[Notes()], accumulate_grad_batches=2)
    logged = [step for step, row in run.logger.rows if "loss_step" in row]
    assert seen == [0, 0, 1, 1]
    assert logged == [0, 1]

    class Bare:
        global_step = 7

    assert logged_at(Bare()) == 7


def test_logs_every(tmp_path: Path) -> None:
    """It is the trainer's own number, and 0 where it has none."""
    assert logs_every(trainer_for(tmp_path, log_every_n_steps=7)) == 7
    assert logs_every(object()) == 0
