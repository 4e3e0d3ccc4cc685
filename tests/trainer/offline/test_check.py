"""The look at a model before it is trained, and whether it can learn a few samples by heart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nanguard import Finding
from lightning_nanguard.thresholds.check import CHECK
from lightning_nanguard.trainer.offline.check import CheckReport, check_batch, first_rows
from lightning_nanguard.trainer.private.first_batch import at_first_batch
from tests.classifier import Model, Numbers
from tests.helpers import trainer_for


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


def test_what_cannot_be_doubled_is_told(tmp_path: Path) -> None:
    """A model that runs in single precision only is not checked, and that is said."""

    class Single(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0].float()), batch[1])

    said: list[Any] = []
    trainer = trainer_for(tmp_path, limit_val_batches=0)
    at_first_batch(
        trainer,
        Single(),
        lambda t, m, batch, i: said.append(check_batch(t, m, batch, gradients=True)),
        datamodule=Numbers(),
    )
    assert "could not be checked in float64" in said[0].notes[0]


def test_first_rows() -> None:
    """A smaller batch of the same structure."""
    cut = first_rows({"x": torch.arange(9), "more": (torch.zeros(9, 2), "word"), "scale": torch.ones(3)}, 4)
    assert [len(cut["x"]), len(cut["more"][0]), cut["more"][1], len(cut["scale"])] == [4, 4, "word", 3]
    assert len(first_rows(Pair(torch.zeros(5), torch.zeros(5)), 2).b) == 2


def test_what_is_sure() -> None:
    """A report is sure where a finding is more likely than not."""
    reports = [CheckReport(), CheckReport([Finding("a", 0.5)]), CheckReport([Finding("b", 0.9), Finding("a", 0.1)])]
    assert [report.sure for report in reports] == [False, False, True]


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
