"""Data in which NaN marks missing values are no sign of a bad batch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from lightning_nanguard import NaNGuard
from tests.helpers import Batch, Task, differences, fit, state_of
from tests.scenarios.struck import NAN


class Masked(Task):
    """Leaves missing targets out of its loss, so that a batch without any target gives NaN."""

    def loss(self, batch: Batch, name: str) -> Tensor:
        x, y = batch
        loss = (self.net(x) - y)[~y.isnan()].square().mean()
        self.log(name, loss)
        return loss


def masked(rate: float) -> Masked:
    torch.manual_seed(0)
    return Masked(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), partial(SGD, lr=rate))


def missing(*, bad_row: bool = False, empty: bool = False) -> DataLoader[Any]:
    """Rows of which half of the targets are missing, one whose input is NaN, or a batch without any target."""
    drawn = torch.Generator().manual_seed(0)
    x = torch.rand(960, 8, generator=drawn)
    y = 10 * x[:, :4] + torch.where(torch.rand(960, 4, generator=drawn) < 0.5, NAN, 0.0)
    if bad_row:
        x[500, 3] = NAN
    if empty:
        y[480:512] = NAN
    return DataLoader(TensorDataset(x, y), 32)


@pytest.mark.parametrize("act_on", ["certain", "evidence"])
def test_a_rate_that_is_too_high_is_lowered(act_on: Any, tmp_path: Path) -> None:
    """Every batch holds NaN, and the learner is at fault: the guard goes back and cuts, and no sample is called bad."""
    guard = NaNGuard(act_on=act_on, dirpath=tmp_path)
    run = fit(masked(20.0), missing(), guard, folder=tmp_path, max_epochs=3)
    first = guard.interventions[0]
    assert {"restore", "scale"} <= set(first.remedies)
    assert first.cause == "learning_rate_too_high"
    assert not (tmp_path / "bad_samples.jsonl").exists()
    losses = [row["loss"] for _, row in run.logger.rows if "loss" in row]
    assert losses[-1] < losses[0] / 2


def test_bad_samples_among_missing_values(tmp_path: Path) -> None:
    """NaN where no healthy batch holds any is a bad sample; a batch without any target is bad as a whole."""
    guard = NaNGuard(dirpath=tmp_path)
    fit(masked(0.02), missing(bad_row=True), guard, folder=tmp_path, max_epochs=2)
    assert [found.remedies for found in guard.interventions] == [("skip",)] * 2
    findings = [found.finding for found in guard.interventions]
    assert [(one.cause, one.place, one.rows) for one in findings if one is not None] == [
        ("non_finite_input", "field 0 of the batch", (500,))
    ] * 2

    guard = NaNGuard(dirpath=tmp_path / "other")
    fit(masked(0.02), missing(empty=True), guard, folder=tmp_path, max_epochs=5)
    assert [found.remedies for found in guard.interventions] == [("skip",)] * 5
    assert {found.cause for found in guard.interventions} == {"division_by_zero"}


def test_missing_values_alone(tmp_path: Path) -> None:
    """A healthy run is the same, bit for bit."""
    guard = NaNGuard(act_on="evidence", dirpath=tmp_path)
    ends = [state_of(fit(masked(0.02), missing(), one, folder=tmp_path, max_epochs=2)) for one in (None, guard)]
    assert differences(*ends) == []
    assert not guard.interventions
