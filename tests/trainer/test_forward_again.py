"""State that goes bad by itself: the updates since the snapshot are made again."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import callbacks as stock
from torch.optim import SGD, AdamW, Optimizer

from lightning_nanguard import NaNGuard
from tests.helpers import Batch, batches, differences, fit
from tests.trainer.faulty_steps import Fault, Faulty, Sees, left_behind

WAYS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "momentum": {"gradient_clip_val": 0.5},
    "accumulated": {"accumulate_grad_batches": 2},
    "averaged": {},
    "bf16": {"precision": "bf16-mixed"},
}
if not hasattr(stock, "EMAWeightAveraging"):
    del WAYS["averaged"]  # this Lightning has none
LEARNER = ("parameters", "buffers", "state_dict", "optimizers", "random", "progress", "carried", "steps", "seen")
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"momentum": partial(SGD, lr=0.05, momentum=0.9)}


class Struck(Faulty):
    """Its weights, buffers or moments are struck before a batch."""

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        bn, optimizer = self.net[1], self.trainer.optimizers[0]
        with torch.no_grad():
            if self.fault.strikes("weight"):
                self.net[0].weight.view(torch.int32)[0, 0] ^= 1 << 30
            if self.fault.strikes("lost weight"):
                self.net[4].weight.fill_(torch.nan)
            if self.fault.strikes("buffer"):
                bn.running_var.fill_(torch.inf)
            if self.fault.strikes("moment"):
                moments = optimizer.state[self.net[0].weight]
                next(one for one in moments.values() if one.dim()).fill_(torch.nan)


def run(way: str, folder: Path, fault: Fault | None, guard: NaNGuard | None) -> dict[str, Any]:
    """Train for two epochs; what is left behind."""
    sees = Sees()
    callbacks = [sees, stock.EMAWeightAveraging(decay=0.9)] if way == "averaged" else [sees]
    module = Struck(fault, OPTIMIZERS.get(way, partial(AdamW, lr=0.01)))
    made = fit(module, batches(count=16), guard, folder=folder, callbacks=callbacks, max_epochs=2, **WAYS[way])
    return left_behind(made, sees)


@cache
def twin(way: str, folder: Path) -> dict[str, Any]:
    """What is left of the run without a fault and without a guard."""
    return run(way, folder, None, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs to compare with lie."""
    return tmp_path_factory.mktemp("twins")


@pytest.mark.parametrize("kind", ["weight", "lost weight", "buffer", "moment"])
@pytest.mark.parametrize("way", WAYS)
def test_state_that_went_bad_by_itself(way: str, kind: str, folder: Path, tmp_path: Path) -> None:
    """The run is bit for bit the one without the fault."""
    fault = Fault(kind, (12, 24))
    guard = NaNGuard(snapshot_every_n_steps=3)
    left = run(way, tmp_path, fault, guard)
    assert fault.hits == 2
    assert {one.remedies for one in guard.interventions} == {("restore", "redo")}
    found = differences(left, twin(way, folder))
    # Where losses stayed finite, what was logged until the fault was found is of the spoiled weights.
    late = kind in ("weight", "buffer")
    assert [one for one in found if not late or one.split("/")[1] in LEARNER] == []
