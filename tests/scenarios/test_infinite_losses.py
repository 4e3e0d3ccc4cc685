"""A loss that overflows while its gradients are finite does not keep a run from training."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from lightning_nanguard import NaNGuard
from tests.helpers import Batch, Task, batches, differences, fit, mlp, seed_all, words


class Overflowing(Task):
    """A term of its loss overflows in some batches, and has no gradient.

    Args:
        when: From which batch on.
    """

    def __init__(self, when: int) -> None:
        seed_all()
        super().__init__(mlp(), lambda parameters: SGD(parameters, lr=0.05))
        self.when = when

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        return loss + math.inf if batch_idx >= self.when else loss


@pytest.mark.parametrize("when", [0, 8])
def test_such_updates_are_made(when: int, tmp_path: Path) -> None:
    """Three in a row are skipped; from the fourth on all are made, bit for bit as without the guard, and the user is
    told once."""
    data = batches(count=24)
    guard = NaNGuard()
    made = fit(Overflowing(when), data, guard, folder=tmp_path)
    without = fit(Overflowing(when), [*data[:when], *data[when + 3 :]])
    assert differences(made.module.net.state_dict(), without.module.net.state_dict()) == []
    assert words(guard) == [("skip",)] * 3
    assert [one.finding.cause for one in guard.advice].count("infinite_loss") == 1
    assert all(bool(torch.isfinite(one).all()) for one in made.module.net.parameters())


def test_such_updates_are_made_in_deferred_readback(tmp_path: Path) -> None:
    """The first one is undone, two more are skipped, and all others are made."""
    guard = NaNGuard(readback="deferred")
    made = fit(Overflowing(8), batches(count=24), guard, folder=tmp_path)
    assert words(guard) == [("restore",), ("skip",), ("skip",)]
    assert all(bool(torch.isfinite(one).all()) for one in made.module.net.parameters())


def test_a_gradient_that_is_bad_is_still_a_fault(tmp_path: Path) -> None:
    """Where losses overflow as a rule, a batch whose gradient is not finite is skipped."""
    data = batches(count=24)
    data[16][0][0, 0] = math.nan
    guard = NaNGuard()
    made = fit(Overflowing(0), data, guard, folder=tmp_path)
    assert words(guard) == [("skip",)] * 4
    assert all(bool(torch.isfinite(one).all()) for one in made.module.net.parameters())


class OverflowingPrediction(Task):
    """A term of its loss overflows where predictions are large, as in fp16, and its gradient does not."""

    def __init__(self) -> None:
        seed_all()
        super().__init__(mlp(), lambda parameters: SGD(parameters, lr=0.05))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        prediction = self.net(batch[0])
        largest = prediction.detach().square().mean() * 1e38 * 62
        return (prediction - batch[1]).square().mean() + largest


def test_neither_the_state_nor_the_rate_is_blamed(tmp_path: Path) -> None:
    """Where the loss becomes infinite because the run has learned, nothing is rolled back and no rate is cut."""
    guard = NaNGuard(snapshot_every_n_steps=2)
    made = fit(OverflowingPrediction(), batches(count=60), guard, folder=tmp_path)
    assert set(words(guard)) == {("skip",)}
    assert len(words(guard)) < 40
    assert guard.lr_multiplier == 1.0
    assert all(bool(torch.isfinite(one).all()) for one in made.module.net.parameters())
