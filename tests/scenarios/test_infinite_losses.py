"""Losses that are not finite and gradients that are too large do not end a run where they do no harm."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, RMSprop
from torch.utils.data import DataLoader

from lightning_nanguard import NaNGuard
from lightning_nanguard.checkpoints.inspection import inspect
from lightning_nanguard.types import ActOn
from tests.helpers import (
    Batch,
    Task,
    TwoOptimizers,
    batches,
    copied,
    differences,
    fit,
    mlp,
    seed_all,
    trainer_for,
    words,
)


class Overflowing(Task):
    """A term of its loss overflows in some batches, and has no gradient.

    Args:
        when: From which batch on.
        term: Its value.
    """

    def __init__(self, when: int, term: float = math.inf) -> None:
        seed_all()
        super().__init__(mlp(), lambda parameters: SGD(parameters, lr=0.05))
        self.when = when
        self.term = term

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        return loss + self.term if batch_idx >= self.when else loss


@pytest.mark.parametrize(
    ("when", "term", "cause"),
    [
        (0, math.inf, "infinite_loss"),
        (8, math.inf, "infinite_loss"),
        (0, math.nan, "nan_loss"),
        (8, math.nan, "nan_loss"),
    ],
)
def test_such_updates_are_made(when: int, term: float, cause: str, tmp_path: Path) -> None:
    """Three in a row are skipped; from the fourth on all are made, bit for bit as without the guard, and the user is
    told once."""
    data = batches(count=24)
    guard = NaNGuard()
    made = fit(Overflowing(when, term), data, guard, folder=tmp_path)
    without = fit(Overflowing(when, term), [*data[:when], *data[when + 3 :]])
    assert differences(made.module.net.state_dict(), without.module.net.state_dict()) == []
    assert words(guard) == [("skip",)] * 3
    assert [one.finding.cause for one in guard.advice].count(cause) == 1
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


class ScaledUp(Task):
    """Its loss is scaled up and its rate down, so that it learns as it would without."""

    def __init__(self) -> None:
        seed_all()
        super().__init__(mlp(), lambda parameters: SGD(parameters, lr=0.05 * 2.0**-70))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean() * 2.0**70


def test_gradients_that_were_always_too_large(tmp_path: Path) -> None:
    """They are skipped as long as another might be good, and made from then on, with one word of advice."""
    data = batches(count=96)
    guard = NaNGuard()
    made = fit(ScaledUp(), data, guard, folder=tmp_path)
    without = fit(ScaledUp(), data[63:])
    assert differences(made.module.net.state_dict(), without.module.net.state_dict()) == []
    assert words(guard) == [("skip",)] * 63
    assert [one.finding.cause for one in guard.advice] == ["gradient_overflow"]


class Squared(Task):
    """Its optimizer divides by squares of gradients, and the scale of its loss makes these infinite."""

    def __init__(self, name: str) -> None:
        seed_all()
        optimizers = {
            "adam": lambda parameters: Adam(parameters, lr=0.01),
            "amsgrad": lambda parameters: Adam(parameters, lr=0.01, amsgrad=True),
            "rmsprop": lambda parameters: RMSprop(parameters, lr=0.01),
        }
        super().__init__(mlp(), optimizers[name])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean() * 2.0**71


@pytest.mark.parametrize(("name", "act_on"), [("adam", "certain"), ("amsgrad", "evidence"), ("rmsprop", "certain")])
def test_squares_that_always_overflow(name: str, act_on: ActOn, tmp_path: Path) -> None:
    """Gradients that the guard lets pass make second moments infinite. That is no fault: the run is the one without the
    guard from then on, its checkpoint is written as it is, and a run may be resumed from it."""
    data = batches(count=160)
    guard = NaNGuard(act_on=act_on, snapshot_every_n_steps=4)
    made = fit(Squared(name), data, guard, folder=tmp_path)
    without = fit(Squared(name), data[63:])
    states = [run.trainer.optimizers[0].state_dict() for run in (made, without)]
    assert differences(*states) == []
    assert any(math.inf in tensor for one in states[0]["state"].values() for tensor in one.values())
    assert differences(made.module.net.state_dict(), without.module.net.state_dict()) == []
    assert words(guard) == [("skip",)] * 63
    made.trainer.save_checkpoint(path := tmp_path / "last.ckpt")
    assert words(guard) == [("skip",)] * 63
    assert inspect(path).good()

    again = NaNGuard(act_on=act_on, snapshot_every_n_steps=4)
    trainer = trainer_for(tmp_path, again, max_epochs=2, limit_val_batches=0)
    trainer.fit(Squared(name), *[DataLoader(data, batch_size=None)] * 2, ckpt_path=path)
    assert trainer.global_step == 320
    assert words(again) == []


class OneForeverBad(TwoOptimizers):
    """The loss of its second optimizer is always NaN."""

    def loss(self, batch: Batch, name: str) -> Tensor:
        return super().loss(batch, name) * (math.nan if name == "loss_1" else 1.0)


def test_one_optimizer_is_always_bad(tmp_path: Path) -> None:
    """Its updates are skipped, however many there are, and those of the other one are made."""
    seed_all()
    guard = NaNGuard()
    module = OneForeverBad()
    before = copied(module.net.state_dict())
    fit(module, batches(count=80), guard, folder=tmp_path)
    assert words(guard) == [("skip",)] * 80
    now = module.net.state_dict()
    changed = {name for name in now if not torch.equal(now[name], before[name])}
    assert changed == {name for name, _ in module.net[:-1].named_parameters()}


class SteppingOut(Task):
    """Its weight goes from 0 to 1, and the root of one batch in eight is of a negative number from 0.5 on."""

    def __init__(self) -> None:
        seed_all()
        super().__init__(nn.Linear(1, 1, bias=False), lambda parameters: SGD(parameters, lr=0.1))
        nn.init.zeros_(self.net.weight)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        weight = self.net.weight.sum()
        room = 0.5 if batch_idx % 8 == 7 else 9.0
        return (weight - 1.0).square() + 1e-3 * (room - weight).sqrt() + 0 * batch[0].sum()


def test_weights_that_hold_on_other_batches_are_not_blamed(tmp_path: Path) -> None:
    """A batch that only the present weights cannot compute is skipped where they do better on most others; neither
    are the weights taken back nor is the rate cut."""
    guard = NaNGuard()
    made = fit(SteppingOut(), batches(count=24), guard, folder=tmp_path)
    assert words(guard) == [("skip",)] * 3
    assert guard.lr_multiplier == 1.0
    assert made.module.net.weight.item() > 0.9
