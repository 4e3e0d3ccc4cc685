"""The best model of a ModelCheckpoint is one with a finite metric."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from pytorch_lightning.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
)

from lightning_nanguard import NaNGuard
from tests.helpers import (
    with_bad,
)
from tests.scenarios.companions import (
    EPOCHS,
    PER_EPOCH,
    assert_clean,
    train,
)

pytestmark = [
    # Lightning's own advice and notes about what these tests do on purpose.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
    pytest.mark.usefixtures("own_folder"),
]


def test_top_k_by_training_loss(tmp_path: Path) -> None:
    """A ModelCheckpoint that follows the training loss never calls a NaN epoch its best."""
    data = with_bad(4, count=PER_EPOCH)
    top = ModelCheckpoint(tmp_path, monitor="loss_epoch", save_top_k=1, mode="min")
    run = train([top], NaNGuard(), data=data)
    assert math.isfinite(float(top.best_model_score))
    assert_clean(run, [top], tmp_path)


def test_early_stopping_is_not_misled() -> None:
    """A NaN batch does not end a run whose EarlyStopping checks the epoch's training loss for being finite."""
    data = with_bad(4, count=PER_EPOCH)
    guard = NaNGuard()
    run = train([EarlyStopping("loss_epoch", patience=50, check_finite=True)], guard, data=data)
    assert run.trainer.current_epoch == EPOCHS
    assert math.isfinite(float(run.trainer.callback_metrics["loss_epoch"]))
