"""The validation loss of a Trainer is watched."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_nanguard import Intervention, NaNGuard
from tests.helpers import Batch, Task, batches, fit, mlp

NAN, GOOD = torch.tensor(math.nan), torch.tensor(1.0)

# What validation_step gives for the two batches of an epoch, and where a fault is found.
EPOCHS: list[tuple[str, list[Any], str | None]] = [
    ("finite", [GOOD, GOOD], None),
    ("one of two", [NAN, GOOD], "validation loss"),
    ("in a dictionary", [{"loss": GOOD}, {"loss": torch.tensor(math.inf)}], "validation loss"),
    ("another entry", [{"other": NAN, "loss": GOOD}, {"loss": GOOD}], None),
    ("no loss but a metric", ["logs NaN", None], "val_loss"),
    ("a metric beside a finite loss", ["logs NaN", GOOD], None),
    ("a whole number", [torch.tensor(3), torch.tensor(3)], None),
    ("again", [NAN, NAN], "validation loss"),
]


class Scripted(Task):
    """Gives what the table says."""

    def validation_step(self, batch: Batch, batch_idx: int) -> Any:
        given = EPOCHS[self.current_epoch][1][batch_idx]
        bad = isinstance(given, str)
        self.log("val_loss", NAN if bad else GOOD, batch_size=8)
        self.log("val_accuracy", NAN, batch_size=8)
        return None if bad else given


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Intervention]:
    """Of one run through the table."""
    guard = NaNGuard()
    data = batches(count=2)
    folder: Path = tmp_path_factory.mktemp("validation")
    fit(Scripted(mlp()), data, guard, folder=folder, val=data, max_epochs=len(EPOCHS))
    return list(guard.interventions)


@pytest.mark.parametrize("epoch", range(len(EPOCHS)), ids=[name for name, _, _ in EPOCHS])
def test_a_loss_that_is_not_finite_is_found(records: list[Intervention], epoch: int) -> None:
    """In any batch, given as a tensor or in a dictionary; where the step gives none, a logged validation loss tells.
    Other metrics may be what they are."""
    assert [one.place for one in records if one.epoch == epoch] == [place for place in [EPOCHS[epoch][2]] if place]


def test_under_a_sound_state_nothing_is_done(records: list[Intervention]) -> None:
    """The data are bad, most likely: it is on record outside any batch, and the run goes on."""
    assert {(one.fault, one.remedies, one.batch_idx) for one in records} == {("non_finite_validation", (), -1)}
    assert records[0].message == "the validation loss is not finite while the training loss is"
