"""Single batches are run outside the loops. Which batches these are, and that they leave no trace, is in
test_batch_replay.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from torch import Tensor

from lightning_nanguard import NaNGuard
from lightning_nanguard.trainer.batch_runs import BatchRuns
from tests.helpers import Batch, Task, batches, copied, differences, fit, mlp


class Raises(Task):
    """Raises an exception for the batches with a negative index."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if batch_idx < 0:
            raise RuntimeError("the step failed")
        return super().training_step(batch, batch_idx)


class Looks(Callback):
    """Runs batches in every way at the end of a run."""

    def __init__(self, guard: NaNGuard, batch: Any) -> None:
        self.guard = guard
        self.batch = batch
        self.found: dict[str, Any] = {}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        assert self.guard._fit is not None
        runs = self.guard._fit.replay._runs
        assert isinstance(runs, BatchRuns)
        found, batch, bad = self.found, self.batch, [one * math.nan for one in self.batch]
        around: list[bool] = []

        @contextmanager
        def noted() -> Iterator[None]:
            around.append(True)
            yield

        found["loss"] = runs.loss(batch, 0, noted())
        with runs.silently():  # without it, the module could not log here
            found["expected"] = float(pl_module.training_step(batch, 0).detach())
        found["failed"] = runs.loss(batch, -1), runs.loss(bad, -1)
        found["gradients"] = runs.gradients(batch, 0, noted())
        found["norm"] = sum(float(p.grad.norm()) for p in pl_module.parameters())
        before = copied([*pl_module.parameters()])
        found["not made"] = runs.update(lambda: None)
        found["the same"] = differences(before, [*pl_module.parameters()]) == []
        found["made"] = runs.update(lambda: runs.gradients(batch, 0))
        found["after"] = runs.loss(batch, 0)
        found["around"] = around


def test_a_batch_is_run(tmp_path: Path) -> None:
    """Its loss, its gradients, and an update on it, each inside the context that is asked for. A step that fails has no
    loss, or NaN if the numbers of the batch are the cause; an update without a loss is not made."""
    torch.manual_seed(0)
    guard = NaNGuard(dirpath=tmp_path)
    looks = Looks(guard, batches(count=1)[0])
    fit(Raises(mlp()), batches(count=4), guard, callbacks=[looks], folder=tmp_path)
    found = looks.found
    assert found["loss"] == found["gradients"] == found["made"] == found["expected"]
    assert found["around"] == [True, True]
    assert found["failed"][0] is None
    assert math.isnan(found["failed"][1])
    assert found["norm"] > 0
    assert (found["not made"], found["the same"]) == (None, True)
    assert found["after"] == pytest.approx(found["made"], rel=0.5)
    assert found["after"] < found["made"]
