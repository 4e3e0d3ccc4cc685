"""Whether a model can learn a few samples by heart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_nanguard.thresholds.check import CHECK
from lightning_nanguard.trainer.offline.check import check_batch
from lightning_nanguard.trainer.private.first_batch import at_first_batch
from tests.classifier import Model, Numbers
from tests.helpers import trainer_for


def test_thresholds_of_the_overfit_test(tmp_path: Path) -> None:
    """How many samples and updates are tried is a threshold that can be set."""
    said: list[str] = []
    few = replace(CHECK, samples=3, overfit_updates=2, adam_rates=(1e-3,))

    def look(trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        said.extend(check_batch(trainer, module, batch, overfit=True, thresholds=few).notes)

    at_first_batch(trainer_for(tmp_path, limit_val_batches=0), Model(lr=1e-9), look, datamodule=Numbers())
    (note,) = said
    assert note.startswith("overfit: 3 samples, loss ")
    assert note.count("in 2 updates") == 2
    assert note.endswith("not learned by heart: look at the loss, the labels, and for tensors that are detached")
