"""Training steps while a Trainer validates."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_nanguard.trainer.private.training_mode import as_in_training
from tests.helpers import Batch, Task, batches, fit, mlp


class Within(Task):
    """Looks at a part of the validation as if it trained; one of its layers is always in evaluation mode."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.frozen = nn.Dropout()
        self.seen: list[Any] = []

    def on_train_epoch_start(self) -> None:
        self.frozen.eval()

    def look(self) -> None:
        stage = self.trainer.training, self.trainer.validating
        modes = self.training, self.net.training, self.frozen.training
        self.seen.append((*stage, *modes, torch.is_grad_enabled()))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.look()
        with as_in_training(self.trainer):
            self.look()
        self.look()

    def on_train_batch_end(self, *args: Any) -> None:
        with as_in_training(self.trainer):
            self.look()


def test_inside_all_is_as_in_training() -> None:
    """Stage, the mode of each module and gradients are those of training inside, and as before afterwards."""
    module = Within()
    fit(module, batches(count=1), val=batches(count=1))
    validates, trains = (False, True, False, False, False, False), (True, False, True, True, False, True)
    assert module.seen == [trains, validates, trains, validates]
