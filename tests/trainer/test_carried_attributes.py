"""Attributes under manual optimization, where a batch is skipped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from lightning_nanguard import NaNGuard
from tests.helpers import Batch, Task, batches, fit, mlp, with_nan, words
from tests.modules import update_by_hand


class Carries(Task):
    """Adds to the loss what the last batch has left in an attribute."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.automatic_optimization = False
        self.carried, self.steps = torch.zeros(()), 0
        self.after: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.steps += 1
        loss = self.loss(batch, "loss") + 0.1 * self.carried
        self.carried = loss.detach()
        update_by_hand(self, loss)

    def on_train_batch_end(self, *args: Any) -> None:
        self.after.append(float(self.carried))


def test_a_skipped_batch_leaves_nothing_in_attributes(tmp_path: Path) -> None:
    """What the bad batch has left is what the batch before it had left; counters of steps go on."""
    data = [with_nan(batch) if index == 6 else batch for index, batch in enumerate(batches(count=12))]
    guard = NaNGuard()
    module = Carries()
    fit(module, data, guard, folder=tmp_path)
    assert words(guard) == [("skip",)]
    assert module.after[6] == module.after[5]
    assert all(map(math.isfinite, module.after))
    assert module.steps == 12


def test_observing_puts_nothing_back(tmp_path: Path) -> None:
    """With ``observe=True`` the attribute stays as the bad batch has left it."""
    data = [with_nan(batch) if index == 6 else batch for index, batch in enumerate(batches(count=12))]
    module = Carries()
    fit(module, data, NaNGuard(observe=True), folder=tmp_path)
    assert math.isnan(module.after[6])
