"""An incident is run again as it was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_nanguard import Fault, NaNGuard
from lightning_nanguard.diagnosis.bundle import Bundle, read
from lightning_nanguard.trainer.offline.replay import ReplayReport, replay_bundle
from lightning_nanguard.types import Evidence
from tests.classifier import Model, Numbers
from tests.helpers import FaultAt, seed_all, trainer_for


def test_a_replay_draws_the_same_numbers(tmp_path: Path) -> None:
    """Dropout masks are those of the step: the loss is that of the run, to the last digit."""
    seen: list[float] = []

    class Keeps(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            seen.append(float(loss.detach()))
            return loss

    seed_all()
    guard = NaNGuard(bundle_dir=tmp_path / "incidents", dirpath=tmp_path)
    trainer = trainer_for(tmp_path, guard, [FaultAt("gradient", math.nan, 14)], max_epochs=5, limit_val_batches=0)
    trainer.fit(Keeps("dropout"), Numbers())
    bundle = read(next((tmp_path / "incidents").iterdir()))
    torch.manual_seed(99)
    (loss,) = replay_bundle(bundle, Model("dropout")).losses
    assert loss == seen[14]


def test_a_batch_that_was_not_kept_whole() -> None:
    """An incident of which a part is missing is refused, with the name of the part."""
    odd = Bundle("m:C", {}, Fault("non_finite_loss", "batch", "loss"), Evidence(1), None, [], {}, missing=["batch/0/1"])
    with pytest.raises(ValueError, match=r"cannot be run again\. Missing: batch/0/1"):
        replay_bundle(odd, Model())


def test_what_counts_as_bad() -> None:
    """A replay went wrong where a loss or the gradient is not finite."""
    reports = [
        ReplayReport([1.0], True),
        ReplayReport([1.0]),
        ReplayReport([math.nan], True),
        ReplayReport([1.0], False),
    ]
    assert [report.bad for report in reports] == [False, False, True, True]
