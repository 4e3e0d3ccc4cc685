"""The length of a run, and the clock that a repeated step sees."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from lightning_nanguard import NaNGuard
from lightning_nanguard.trainer.private.clock import clock_kept, expected_updates, set_clock
from tests.helpers import Task, batches, differences, fit, state_of, task


def test_the_clock_is_restored(tmp_path: Path) -> None:
    """Inside, trainer and module have the clock that was set; at the end that of the run."""
    seen: list[tuple[int, ...]] = []

    class Sets(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            with clock_kept(trainer):
                set_clock(trainer, 7, 3)
                seen.append((trainer.global_step, pl_module.global_step, trainer.current_epoch))
            seen.append((trainer.global_step, pl_module.global_step, trainer.current_epoch))

    fit(task(), batches(count=2), folder=tmp_path, callbacks=[Sets()])
    assert seen == [(7, 7, 3), (0, 0, 0), (7, 7, 3), (1, 1, 0)]


# Outside of the module, because a skipped batch is undone in the module's own lists.
SEEN: list[tuple[int, int, int]] = []


class Annealed(Task):
    """The weight of a term of the loss depends on step and epoch, and in step 12 this term is NaN."""

    spoilt: int | None = None

    def __init__(self) -> None:
        super().__init__(task().net, None, None, None)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        SEEN.append((batch_idx, self.global_step, self.current_epoch))
        loss = super().training_step(batch, batch_idx)
        term = math.nan if self.global_step == self.spoilt else 1.0 / (1 + self.global_step + 5 * self.current_epoch)
        return loss * term


class Strikes(Callback):
    """Makes a weight NaN once."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 13:
            with torch.no_grad():
                pl_module.net[0].weight[0, 0] = math.nan


def test_updates_that_are_made_again_see_their_own_clock(tmp_path: Path) -> None:
    """A weight that goes bad by itself costs nothing, although the loss depends on the step and the epoch."""
    SEEN.clear()
    bare = fit(Annealed(), batches(count=10), folder=tmp_path / "bare", max_epochs=2)
    guard = NaNGuard(snapshot_every_n_steps=5)
    run = fit(Annealed(), batches(count=10), guard, folder=tmp_path, max_epochs=2, callbacks=[Strikes()])
    assert [one.remedies for one in guard.interventions] == [("restore", "redo")]
    assert differences(state_of(bare)["parameters"], state_of(run)["parameters"]) == []
    assert {(step, epoch) for _, step, epoch in SEEN} == {(step, step // 10) for step in range(20)}


def test_a_fault_that_depends_on_the_step_is_found(tmp_path: Path) -> None:
    """All passes of the diagnosis see the step of the batch, so the batch is skipped, and the cause is named."""
    SEEN.clear()
    module, guard = Annealed(), NaNGuard(snapshot_every_n_steps=5)
    module.spoilt = 12
    fit(module, batches(count=10), guard, folder=tmp_path, max_epochs=2)
    (record,) = guard.interventions
    assert record.remedies == ("skip",)
    assert record.cause == "unknown_operation"
    assert {step for index, step, epoch in SEEN if (index, epoch) == (2, 1)} == {12}


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
