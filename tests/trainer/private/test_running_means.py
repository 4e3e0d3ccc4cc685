"""The running means behind ``self.log(on_epoch=True)``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning import Callback, Trainer
from pytorch_lightning import callbacks as stock
from torch.optim import SGD

from lightning_nanguard import NaNGuard
from lightning_nanguard.trainer.private.running_means import remember_running_means
from tests.helpers import Batch, Task, batches, fit, mlp, task, with_nan


def test_running_means_are_put_back(tmp_path: Path) -> None:
    """What a batch logged is taken out of the epoch's means, a value it logged for the first time too."""

    class Forgets(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
            self.undo = remember_running_means(trainer)

        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
        ) -> None:
            if batch_idx in (0, 3):
                self.undo()

    data, means = batches(count=5), []
    for given, callbacks in ((data, [Forgets()]), ([data[1], data[2], data[4]], [])):
        module = task(optimizer=lambda p: SGD(p, lr=0.0))  # so that each batch has the same loss in both runs
        run = fit(module, given, callbacks=callbacks, folder=tmp_path)
        means.append(float(run.trainer.callback_metrics["loss_epoch"]))
    assert means[0] == means[1]


class Validated(Task):
    """Is validated without a logged loss."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass


@pytest.mark.parametrize(("bad", "count"), [(1, 8), (1, 1)], ids=["one of eight", "the only one of its epoch"])
def test_a_mean_is_not_known_before_its_epoch_ends(bad: int, count: int, tmp_path: Path) -> None:
    """A skipped first batch does not make it NaN before that, so that nothing stops at it and nothing is reported.
    At the end of an epoch without another batch it is NaN, and not missing."""
    data = [with_nan(batch) if index < bad else batch for index, batch in enumerate(batches(count=count))]
    guard = NaNGuard()
    stops = stock.EarlyStopping("loss_epoch", strict=count == 1, check_finite=count > 1, patience=9)
    interval = {"val_check_interval": 0.25} if count > 1 else {}
    run = fit(
        Validated(mlp()), data, guard, folder=tmp_path, val=data[-1:], callbacks=[stops], max_epochs=2, **interval
    )
    assert run.trainer.current_epoch == 2
    assert {one.remedies for one in guard.interventions} == {("skip",)}
