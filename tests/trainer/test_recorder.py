"""A run leaves its curves, and the norms of its layers before an incident."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_nanguard import NaNGuard
from lightning_nanguard.record.curve import CURVE_FILE, read_curve
from lightning_nanguard.record.files import LAST_GOOD
from lightning_nanguard.record.layer_norms import LAYER_NORMS_FILE, read_layer_norms
from tests.helpers import FaultAt, batches, fit, folder_of, task, trainer_for, with_bad

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")


class Measure(Callback):
    """What loss and gradient norm are, measured by another callback."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        self.losses.append(float(loss.detach()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.norms.append(math.hypot(*(float(p.grad.norm()) for p in pl_module.parameters() if p.grad is not None)))


@pytest.mark.parametrize("readback", ["step", "deferred"])
def test_the_curve_of_a_run(readback: str, tmp_path: Path) -> None:
    """Loss, gradient norm and learning rate of every update are in the file, also those of a skipped one."""
    measure = Measure()
    guard = NaNGuard(readback=readback)
    fit(task(optimizer=lambda p: SGD(p, lr=0.05)), with_bad(6, count=12), guard, folder=tmp_path, callbacks=[measure])
    points = read_curve(folder_of(guard) / CURVE_FILE)
    assert [point.step for point in points] == list(range(1, 13))
    assert [point.loss for point in points] == pytest.approx(measure.losses, rel=1e-5, nan_ok=True)
    assert [point.grad_norm for point in points] == pytest.approx(measure.norms, rel=1e-5, nan_ok=True)
    assert math.isnan(points[6].loss or 0.0)
    assert {point.lr for point in points} == {0.05}


def test_a_resumed_run_goes_on_with_its_curve(tmp_path: Path) -> None:
    """The steps of a run that goes on from its checkpoint are those of the trainer, in the same file."""
    guards = []
    for epochs, path in ((1, None), (2, tmp_path / LAST_GOOD)):
        guard = NaNGuard(dirpath=tmp_path, last_good_every_n_steps=4, snapshot_every_n_steps=2)
        trainer = trainer_for(tmp_path, guard, max_epochs=epochs, limit_val_batches=0)
        data = DataLoader(batches(count=12), batch_size=None)
        trainer.fit(task(), data, data, ckpt_path=path)
        guards.append(guard)
    assert guards[0].run_id == guards[1].run_id
    steps = [point.step for point in read_curve(tmp_path / CURVE_FILE)]
    begun = steps[12] - 1
    assert 4 <= begun < 12
    assert steps == [*range(1, 13), *range(begun + 1, begun + 1 + len(steps) - 12)]


def test_the_norms_of_the_layers_before_an_incident(tmp_path: Path) -> None:
    """At an incident the norms of each layer in the updates up to it are on disk and say where it began, also where the
    step was skipped and its gradients are gone."""
    guard = NaNGuard()
    fault = FaultAt("gradient", math.inf, 9, "net.2.weight")
    fit(task(), batches(count=24), guard, folder=tmp_path, callbacks=[fault])
    (found,) = read_layer_norms(folder_of(guard) / LAYER_NORMS_FILE)
    assert (found.run, found.fault, found.global_step) == (guard.run_id, guard.interventions[0].fault, 10)
    assert found.updates == tuple(range(3, 11))
    assert list(found.layers) == ["net.2", "net.0"]
    assert [math.isfinite(norm or 0.0) for norm in found.layers["net.2"]] == [True] * 7 + [False]
    assert all(math.isfinite(norm or 0.0) and norm for norm in found.layers["net.0"])


def test_joined_small_tensors_are_no_reason_for_silence(tmp_path: Path) -> None:
    """A model of many small tensors, which are measured together, leaves its norms too."""
    model = task()
    model.net = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(60)), torch.nn.Linear(6, 2))
    guard = NaNGuard()
    fit(model, with_bad(4, count=8), guard, folder=tmp_path)
    (found,) = read_layer_norms(folder_of(guard) / LAYER_NORMS_FILE)
    assert list(found.layers) == ["122 small tensors"]
