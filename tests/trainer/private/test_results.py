"""The running means behind ``self.log``."""

from __future__ import annotations

from typing import Any

import pytest
from pytorch_lightning import Callback

from lightning_nanguard.trainer.private.results import remember_running_means
from tests.helpers import batches, fit, task


class Forgets(Callback):
    """Undoes what one batch has logged."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.undo = remember_running_means(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in (0, 3):
            self.undo()


def test_a_batch_is_taken_out_of_the_epochs_mean() -> None:
    """The mean of the epoch is that of the other batches, the first one included."""
    run = fit(task(), batches(count=5), callbacks=[Forgets()])
    # What was logged last stays in sight where a batch is taken out.
    kept = {row["loss_step"] for _, row in run.logger.rows if "loss_step" in row}
    assert len(kept) == 3
    assert float(run.trainer.callback_metrics["loss_epoch"]) == pytest.approx(sum(kept) / 3)
