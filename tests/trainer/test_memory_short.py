"""Where memory is too short for a second look, the run goes on as without one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_nanguard import NaNGuard
from lightning_nanguard.state import batch_undo, restore
from lightning_nanguard.trainer.repeat import updates_again
from lightning_nanguard.trainer.repeat.attempts import Attempts
from tests.helpers import FaultAt, batches, fit, task, words
from tests.trainer.faulty_steps import Fault, Faulty
from tests.trainer.repeat.test_updates_again import Struck


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.cuda.OutOfMemoryError("out of memory")


def short_of_undo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be no memory to remember a batch thoroughly."""
    begins = batch_undo.BatchUndo.open

    def opened(self: batch_undo.BatchUndo) -> None:
        (out_of_memory if self._thorough else begins)(self)

    monkeypatch.setattr(batch_undo.BatchUndo, "open", opened)


@pytest.mark.parametrize("kind", ["weight", "lost weight"])
def test_a_state_gone_bad_is_rolled_back(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The updates since the snapshot are not made again."""
    monkeypatch.setattr(updates_again, "capture", out_of_memory)
    guard = NaNGuard(snapshot_every_n_steps=3)
    made = fit(Struck(Fault(kind, (12,))), batches(count=24), guard, folder=tmp_path)
    assert guard.interventions
    assert "redo" not in guard.interventions[0].remedies
    assert all(bool(torch.isfinite(one).all()) for one in made.module.parameters())


@pytest.mark.parametrize("where", ["undo", "gradients"])
def test_a_window_is_skipped(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its micro-batches are not run again one by one."""
    if where == "undo":
        short_of_undo(monkeypatch)
    else:
        monkeypatch.setattr(Attempts, "gradients", out_of_memory)
    guard = NaNGuard()
    fit(Faulty(Fault("gradient", (10,))), batches(count=24), guard, folder=tmp_path, accumulate_grad_batches=3)
    assert words(guard) == [("skip",)]


def test_a_batch_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the batch or the weights are bad stays unknown."""
    short_of_undo(monkeypatch)
    guard = NaNGuard(snapshot_every_n_steps=5)
    fault = FaultAt("loss", math.nan, [20])
    fit(task(), batches(count=40), guard, folder=tmp_path, callbacks=[fault])
    assert len(guard.interventions) == 1


class Checks(Faulty):
    """Raises where its loss is not finite."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if not torch.isfinite(loss):
            raise ValueError("the loss is NaN")
        if self.net[0].weight.abs().max() > 1e3:
            raise ValueError("a weight is too large")
        return loss


def test_an_exception_stays_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised where the last good weights cannot be tried, and not an error of memory."""
    monkeypatch.setattr(restore, "capture", out_of_memory)
    monkeypatch.setattr(updates_again, "capture", out_of_memory)

    class Spoilt(Checks):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(batch, batch_idx)
            if batch_idx == 20:
                with torch.no_grad():
                    self.net[0].weight.fill_(1e4)

    with pytest.raises(ValueError, match="a weight is too large"):
        fit(Spoilt(None), batches(count=24), NaNGuard(snapshot_every_n_steps=3), folder=tmp_path)
