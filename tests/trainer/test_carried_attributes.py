"""Attributes under manual optimization, where a batch is skipped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
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


class Normalises(Task):
    """Subtracts a running mean that a hook around the step keeps."""

    def __init__(self, hook: str, *, automatic: bool) -> None:
        super().__init__(mlp())
        self.automatic_optimization = automatic
        self.hook, self.mean = hook, torch.zeros(())

    def keep(self, hook: str, value: torch.Tensor) -> None:
        if hook == self.hook:
            self.mean = 0.9 * self.mean + 0.1 * value

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        self.keep("on_after_batch_transfer", batch[0].mean())
        return batch

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.keep("on_train_batch_start", batch[0].mean())

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.keep("on_train_batch_end", batch[0].mean())

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = self.loss((batch[0] - self.mean, batch[1]), "loss")
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("hook", ["on_after_batch_transfer", "on_train_batch_start", "on_train_batch_end"])
def test_a_running_mean_that_a_hook_keeps_survives_a_bad_batch(hook: str, automatic: bool, tmp_path: Path) -> None:
    """The mean that a bad batch made NaN outside the step is the last good one again, and one batch is skipped."""
    data = [with_nan(batch) if index == 6 else batch for index, batch in enumerate(batches(count=12))]
    guard, module = NaNGuard(), Normalises(hook, automatic=automatic)
    fit(module, data, guard, folder=tmp_path)
    assert words(guard) == [("skip",)]
    assert math.isfinite(float(module.mean))
