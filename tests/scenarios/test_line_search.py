"""Faults at weights that an optimizer tries within one step, as LBFGS does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS

from lightning_nanguard import NaNGuard
from tests.helpers import Batch, Task, batches, fit, seed_all, words


class Overshooting(Task):
    """Its rate is nearly twice too high, and from batch 24 on a step leads below 0, where a solver fails."""

    def __init__(self) -> None:
        seed_all()
        super().__init__(nn.Linear(1, 1, bias=False), lambda parameters: LBFGS(parameters, lr=1.9, max_iter=4))
        nn.init.ones_(self.net.weight)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        weight = self.net.weight.sum()
        target = 4.5 if batch_idx < 24 else 1.0
        return (weight - target).square() / 2 + 0 * torch.linalg.cholesky(weight.reshape(1, 1)).sum()


def test_a_solver_that_fails_at_weights_that_are_only_tried(tmp_path: Path) -> None:
    """The weights of the run are fine with each batch, and the step leads away from them. So after a few skipped
    batches the learner is at fault, and the rate is lowered. Part of it comes back later. The operation is found at the
    weights that were tried."""
    guard = NaNGuard(snapshot_every_n_steps=4)
    made = fit(Overshooting(), batches(count=96), guard, folder=tmp_path)
    assert words(guard) == [("skip",)] * 3 + [("restore", "scale"), ("give back",)]
    for record in guard.interventions[:4]:
        assert record.message.startswith("training_step raised _LinAlgError: linalg.cholesky")
        assert record.finding is not None
        assert record.finding.place.startswith("training_step (linalg_cholesky_ex, test_line_search.py:")
        assert record.finding.scope == "learner"
        assert "Only weights that the optimizer tried within its step show this" in record.finding.suggestion
    assert guard.lr_multiplier < 1
    assert made.module.net.weight.item() == pytest.approx(1.0, abs=0.01)
