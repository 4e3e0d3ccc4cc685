"""State that goes bad by itself: the updates since the snapshot are made again."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning import callbacks as stock
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torchmetrics import MeanMetric

from lightning_nanguard import NaNGuard
from lightning_nanguard.metrics import NonFiniteRate
from lightning_nanguard.trainer.repeat.updates_again import measures_now, put_measures
from tests.helpers import (
    OUTPUTS,
    Batch,
    FaultAt,
    Task,
    batches,
    differences,
    fit,
    learner_of,
    task,
    with_last_rows,
    with_nan,
    words,
)
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
    found = differences(with_last_rows(left), with_last_rows(twin(way, folder)))
    # Where losses stayed finite, callbacks and epoch means may have been given those of the spoiled weights.
    late = kind in ("weight", "buffer")
    assert [one for one in found if not late or one.split("/")[1] in LEARNER or "/loss_step " in one] == []


def test_rows_of_spoiled_weights_are_logged_again(tmp_path: Path) -> None:
    """Loggers get a second row of each step whose loss was wrong, of no other, and the last one is right."""
    rows = []
    for fault in (None, Fault("weight", (10,))):
        guard = NaNGuard(snapshot_every_n_steps=5)
        made = fit(Struck(fault, partial(AdamW, lr=0.01)), batches(count=16), guard, folder=tmp_path)
        rows.append([(step, row["loss_step"]) for step, row in made.logger.rows if "loss_step" in row])
    expected, logged = rows
    steps = [step for step, _ in logged]
    twice = [step for step, _ in expected if steps.count(step) == 2]
    assert len(logged) == len(expected) + len(twice)
    assert twice == list(range(10, 10 + len(twice))) != []
    assert all(dict(reversed(logged))[step] != value for step, value in expected if step in twice)
    assert dict(logged) == dict(expected)


class StruckAfterEpoch(Callback):
    """Loses a weight after the last batch of an epoch, when the guard has seen this batch already."""

    def __init__(self, hook: str) -> None:
        self.hits = 0
        setattr(self, hook, self._strike)

    def _strike(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if not self.hits and trainer.is_last_batch and trainer.global_step == 16:
            self.hits += 1
            with torch.no_grad():
                pl_module.net[4].weight.fill_(torch.nan)


class Validated(Faulty):
    """Notes in which mode its parts are validated."""

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen.append(-sum(one.training for one in self.modules()) - 1)
        self.log("val_loss", loss := nn.functional.mse_loss(self.net(batch[0]), batch[1]))
        return loss


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_start"])
def test_a_weight_lost_before_validation(hook: str, tmp_path: Path) -> None:
    """The updates are made again although the Trainer validates. Only what was validated with the lost weight differs.

    The run is bit for bit the one without the fault, and its parts are in evaluation mode for the rest of the
    validation.
    """
    data, left = batches(count=16), []
    for struck, guard in ((StruckAfterEpoch(hook), NaNGuard(snapshot_every_n_steps=6)), (None, None)):
        sees = Sees()
        module = Validated(None, partial(AdamW, lr=0.01))
        stops = stock.EarlyStopping("val_loss", patience=9, check_finite=False)
        callbacks = [sees, stops, *([struck] if struck else [])]
        made = fit(module, data, guard, folder=tmp_path, val=data[:2], callbacks=callbacks, max_epochs=2)
        left.append(left_behind(made, sees))
        if struck is not None and guard is not None:
            assert struck.hits == 1
            assert [one.remedies for one in guard.interventions] == [("restore", "redo")]
    found = differences(with_last_rows(left[0]), with_last_rows(left[1]))
    assert [one for one in found if hook == "on_train_batch_end" or one.split("/")[1] in LEARNER] == []


@pytest.mark.parametrize("accumulated", [1, 2])
def test_updates_that_were_skipped_are_not_made_again(accumulated: int, tmp_path: Path) -> None:
    """A bad batch was skipped since the snapshot: the run goes forward again without it, bit for bit."""
    data = [with_nan(batch) if index in (8, 9) else batch for index, batch in enumerate(batches(count=16))]
    options: dict[str, Any] = {"max_epochs": 1, "accumulate_grad_batches": accumulated}
    ends = []
    for fault in (None, Fault("lost weight", (12,))):
        sees, guard = Sees(), NaNGuard(snapshot_every_n_steps=6 // accumulated)
        made = fit(Struck(fault, partial(AdamW, lr=0.01)), data, guard, folder=tmp_path, callbacks=[sees], **options)
        ends.append((left_behind(made, sees), [one.remedies for one in guard.interventions]))
    (expected, skips), (left, told) = ends
    assert set(skips) == {("skip",)}
    assert told == [*skips, ("restore", "redo")]
    assert differences(left, expected) == []


def test_a_window_that_has_changed_since_the_snapshot(tmp_path: Path) -> None:
    """Each update is made again with the number of micro-batches that it had, bit for bit."""
    ends, window = [], {0: 4, 1: 2}
    for fault in (None, Fault("lost weight", (19,))):
        sees, guard = Sees(), NaNGuard(snapshot_every_n_steps=8)
        called = [sees, stock.GradientAccumulationScheduler(window)]
        struck = Struck(fault, partial(AdamW, lr=0.01))
        made = fit(struck, batches(count=16), guard, folder=tmp_path, callbacks=called, max_epochs=2)
        ends.append((learner_of(made.trainer, made.module), words(guard), made.trainer.accumulate_grad_batches))
    (expected, nothing, _), (left, told, count) = ends
    assert (nothing, told, count) == ([], [("restore", "redo")], 2)
    assert differences(left, expected) == []


class Overflows(nn.Module):
    """Huge inputs overflow its gradient and the statistics of its batch norm. Its loss stays finite."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm1d(6)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        self.statistics(x)
        return self.last(torch.sin(self.first(x)))


def test_bad_batches_in_a_row_are_skipped_alone(tmp_path: Path) -> None:
    """When the second of them is examined, the skipped first one is not run again: its buffers are not blamed."""
    data = [(x * 1e20, y) if index % 8 in (4, 5, 6) else (x, y) for index, (x, y) in enumerate(batches(count=24))]
    guard = NaNGuard(snapshot_every_n_steps=3)
    made = fit(Task(Overflows()), data, guard, folder=tmp_path, max_epochs=2)
    assert [(one.fault, one.remedies) for one in guard.interventions] == [("gradient_overflow", ("skip",))] * 18
    assert made.trainer.global_step == 48


def test_a_batch_that_was_skipped_before_is_no_obstacle(tmp_path: Path) -> None:
    """From the next snapshot on updates can be made again; the run ends as one that met the bad batch alone."""
    states = []
    for name, kinds in (("both", {"loss": 5, "weight": 14}), ("one", {"loss": 5})):
        struck = [FaultAt(kind, math.nan, at) for kind, at in kinds.items()]
        guard = NaNGuard(snapshot_every_n_steps=3)
        made = fit(task("norm"), batches(count=20), guard, folder=tmp_path / name, callbacks=struck)
        states.append((words(guard), learner_of(made.trainer, made.module)))
    (both, left), (one, expected) = states
    assert (both, one) == ([("skip",), ("restore", "redo")], [("skip",)])
    assert differences(left, expected) == []


class Measured(nn.Module):
    """Has a metric of the user's and one of the guard's."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.rate = MeanMetric(), NonFiniteRate()


def made() -> tuple[Measured, MeanMetric, Callable[[], Any]]:
    module, running = Measured(), MeanMetric()
    results = SimpleNamespace(_results={"loss": running})
    trainer: Any = SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=results))
    return module, running, partial(measures_now, trainer, module)  # type: ignore[arg-type]


def test_what_as_many_batches_have_left_is_taken() -> None:
    """A metric and a running mean that have seen as many batches as in the run take the repeated values."""
    module, running, now = made()
    for metric in (module.mean, running):
        metric.update(5.0)
    before = now()
    for metric in (module.mean, running):
        metric.reset()
        metric.update(2.0)
    repeated = now()
    put_measures(before)
    assert float(module.mean.compute()) == 5.0
    put_measures(repeated, repeated=True)
    assert (float(module.mean.compute()), float(running.compute())) == (2.0, 2.0)


def test_what_others_have_reset_is_left_alone() -> None:
    """A metric that a validation has updated meanwhile stays as it is; so does what counts skipped batches."""
    module, _, now = made()
    module.mean.update(1.0)
    repeated = now()
    module.mean.update(3.0)
    module.rate.update(torch.nan)
    put_measures(repeated, repeated=True)
    assert float(module.mean.compute()) == 2.0
    assert float(module.rate.compute()) == 1.0


def test_what_is_remembered_does_not_change() -> None:
    """Metrics that are written in place, and put back twice, are the same both times."""
    module, _, now = made()
    module.mean.update(1.0)
    before = now()
    for _ in range(2):
        module.mean.update(5.0)
        put_measures(before)
        assert float(module.mean.compute()) == 1.0
