"""The expected length of a run."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pytorch_lightning import Callback, LightningModule, Trainer

from lightning_nanguard.trainer.run_length import expected_updates
from tests.helpers import batches, fit, task


class Asks(Callback):
    """Asks for the length of the run in its first batch, and ends it."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.answer = expected_updates(trainer)
        trainer.should_stop = True


@pytest.mark.parametrize(
    ("options", "updates"),
    [
        ({"max_epochs": 2}, 24),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, 8),
        ({"max_epochs": 5, "max_steps": 7}, 7),
        ({"max_epochs": -1}, math.inf),
    ],
    ids=["epochs", "accumulation", "steps", "no limit"],
)
def test_the_limits_of_the_trainer_give_the_length(options: dict[str, Any], updates: float) -> None:
    """The length is what the Trainer's limits allow."""
    asks = Asks()
    fit(task(), batches(count=12), callbacks=[asks], **options)
    assert asks.answer == updates
