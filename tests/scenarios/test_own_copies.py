"""Copies of the weights that the user keeps are the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning import Callback
from torch import Tensor

from lightning_nanguard import NaNGuard
from tests.helpers import ONCE, batches, copied, fit, task
from tests.modules import NaNWeight


class Best(Callback):
    """Keeps the best weights so far: a dictionary, made anew now and then."""

    def __init__(self) -> None:
        self.best: dict[str, Tensor] = {}
        self.written: list[Any] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in (2, 5, 13, 21):
            self.best = copied(dict(module.named_parameters()))
            self.written = [value.tolist() for value in self.best.values()]


@pytest.mark.parametrize("hit", [6, 14, 22])
def test_the_best_weights_survive_a_rollback(hit: int, tmp_path: Path) -> None:
    """A restore rewinds the learner and not what the user keeps of it."""
    guard, best = NaNGuard(thresholds=ONCE, dirpath=tmp_path, snapshot_every_n_steps=4), Best()
    fit(task(), batches(count=24), guard, callbacks=[best, NaNWeight(hit)])
    assert [one.remedies for one in guard.interventions] == [("restore",)]
    assert [value.tolist() for value in best.best.values()] == best.written
