"""The running means behind ``self.log(on_epoch=True)``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, Trainer
from torch.optim import SGD

from lightning_nanguard.trainer.private.running_means import remember_running_means
from tests.helpers import Batch, batches, fit, task


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
