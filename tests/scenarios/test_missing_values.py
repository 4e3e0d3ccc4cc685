"""Values that are missing by design, and batches in which nothing is selected, are no sign of a fault."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD, Adam
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


class Triplets(Task):
    """The mean over triplets that are not yet in order. There may be none when the model has learned enough."""

    def loss(self, batch: Batch, name: str) -> Tensor:
        x, y = batch
        z = nn.functional.normalize(self.net(x), dim=1)
        far, same = torch.cdist(z, z), y[:, None] == y
        pairs = same & ~torch.eye(len(y), dtype=torch.bool)
        margins = (far[:, :, None] - far[:, None, :] + 0.2)[pairs[:, :, None] & ~same[:, None, :]]
        return margins[margins > 0].mean()


def test_nothing_is_selected_because_the_model_has_learned(tmp_path: Path) -> None:
    """Older weights have a finite loss on such a batch, and are no better on others: it is skipped, and no more."""
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images[:640] / 16, dtype=torch.float32), torch.tensor(labels[:640]))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    guard = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=32)
    fit(Triplets(net, partial(Adam, lr=3e-3)), DataLoader(data, 16), guard, folder=tmp_path, max_epochs=2)
    assert {found.remedies for found in guard.interventions} == {("skip",)}
    assert guard.lr_multiplier == 1.0
