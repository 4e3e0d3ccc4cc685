"""Buffers that are the module's own: what they hold is its business, as long as no loss depends on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import SGD

from lightning_nanguard import NaNGuard
from tests.helpers import Batch, Task, batches, differences, fit, learner_of, mlp, state_of, with_nan, words

NAN = float("nan")


class PadsWithNaN(Task):
    """Keeps the losses of the epoch in a buffer whose free places are NaN."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.register_buffer("history", torch.zeros(30))

    def on_train_epoch_start(self) -> None:
        self.history.fill_(NAN)

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.history[batch_idx] = loss.detach()
        return loss


class MeansOfClasses(Task):
    """Keeps a mean for each class, which is 0/0 before its first sample."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.register_buffer("class_mean", torch.zeros(40))

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        place = (batch[0][:, 0] * 4 + 20).nan_to_num(0.0).long().clamp(0, 39)
        count = torch.zeros(40).index_add_(0, place, torch.ones(len(place)))
        self.class_mean = torch.zeros(40).index_add_(0, place, batch[1][:, 0]) / count
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("make", [PadsWithNaN, MeansOfClasses])
def test_nan_that_no_loss_depends_on_is_left_alone(make: type[Task], tmp_path: Path) -> None:
    """A healthy run is the same bit by bit, with its buffer, and a NaN sample costs its batch alone."""
    runs = []
    for guards in ([], [NaNGuard(snapshot_every_n_steps=3)]):
        torch.manual_seed(0)
        module = make()
        run = fit(module, batches(count=20), *guards, folder=tmp_path / str(len(guards)), max_epochs=3)
        runs.append(state_of(run))
    assert not differences(*runs)
    assert not guards[0].interventions

    torch.manual_seed(0)
    data, guard = batches(count=20), NaNGuard(snapshot_every_n_steps=3)
    data[4] = with_nan(data[4])
    fit(make(), data, guard, folder=tmp_path / "bad", max_epochs=2)
    assert words(guard) == [("skip",)] * 2
    assert {one.cause for one in guard.interventions} == {"non_finite_input"}


class TakesLogarithms(MeansOfClasses):
    """Its loss is infinite for targets of zero. Which means are 0/0 depends on the batch."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) - batch[1].abs().sum().log() * self.net(batch[0]).mean()


def test_a_buffer_is_not_blamed_for_a_finite_batch(tmp_path: Path) -> None:
    """If the loss of a batch is bad with the buffers of the last snapshot, too, the batch is skipped."""
    torch.manual_seed(0)
    data, guard = batches(count=20), NaNGuard(snapshot_every_n_steps=3)
    data[9] = [data[9][0], torch.zeros_like(data[9][1])]
    fit(TakesLogarithms(), data, guard, folder=tmp_path)
    (found,) = guard.interventions
    assert (found.remedies, found.cause) == (("skip",), "target_out_of_domain")


class MakesABuffer(Task):
    """Fills a buffer that is ``None`` at the start, with NaN at some places."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.register_buffer("usage", None)

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        self.usage = torch.tensor([float(batch_idx), NAN])
        return super().training_step(batch, batch_idx)


def test_a_checkpoint_keeps_nan_of_the_modules_own(tmp_path: Path) -> None:
    """Saving a run with such a buffer is no intervention, and the file holds what the module holds."""
    guard = NaNGuard()
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1)
    fit(MakesABuffer(), batches(count=12), guard, folder=tmp_path, callbacks=[saves], enable_checkpointing=True)
    assert guard.interventions == []
    files = sorted(tmp_path.glob("*.ckpt"))
    assert files
    for file in files:
        assert bool(torch.isnan(torch.load(file, weights_only=True)["state_dict"]["usage"][1]))


class Subtracts(nn.Module):
    """Subtracts a buffer that nobody writes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.mean


class LosesABuffer(Task):
    """The buffer becomes NaN by itself."""

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if batch_idx == 9 and not self.struck:
            self.struck = True
            self.net[0].mean[3] = NAN

    struck = False


def test_a_buffer_that_a_loss_depends_on_is_restored(tmp_path: Path) -> None:
    """NaN that appears by itself in such a buffer costs nothing: the run is the same as without it."""
    ends = []
    for module_of in (Task, LosesABuffer):
        torch.manual_seed(0)
        guard = NaNGuard(snapshot_every_n_steps=3)
        module = module_of(nn.Sequential(Subtracts(), mlp()))
        run = fit(module, batches(count=20), guard, folder=tmp_path / module_of.__name__)
        ends.append(learner_of(run.trainer, run.module))
    assert not differences(*ends)
    assert words(guard) == [("redo",)]


class Remembers(Task):
    """Compares with a bank of the newest inputs, which grows at first."""

    def __init__(self, size: int | None) -> None:
        super().__init__(mlp())
        self.register_buffer("bank", None if size is None else torch.zeros(size, 6))

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        self.bank = batch[0] if self.bank is None else torch.cat([self.bank, batch[0]])[-4096:]
        return super().training_step(batch, batch_idx) + 0.01 * self.net(self.bank).square().mean()


@pytest.mark.parametrize("size", [None, 0, 64, 4096])
def test_a_skipped_batch_leaves_a_growing_buffer(size: int | None, tmp_path: Path) -> None:
    """The bank is as before the bad batch, whatever its shape, so that one NaN sample costs one batch."""
    data, ends = batches(count=14), []
    for bad in (True, False):
        torch.manual_seed(0)
        guard = NaNGuard()
        given = [with_nan(one) if bad and index == 3 else one for index, one in enumerate(data) if bad or index != 3]
        run = fit(Remembers(size), given, guard, folder=tmp_path / str(bad))
        ends.append(learner_of(run.trainer, run.module))
        assert words(guard) == [("skip",)] * bad
    assert not differences(*ends)


class Holder:
    """An object of the user's that holds a module."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net


class HidesTeachers(Task):
    """Holds two networks where torch does not list them, and runs them on each batch."""

    def __init__(self) -> None:
        super().__init__(mlp(norm=True), lambda parameters: SGD(parameters, lr=1e-5))
        self.teachers = [mlp(norm=True).requires_grad_(requires_grad=False)]
        self.helper = Holder(mlp(norm=True).requires_grad_(requires_grad=False))

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        target = self.teachers[0](batch[0]) + self.helper.net(batch[0])
        return super().training_step(batch, batch_idx) + 0.1 * (self.net(batch[0]) - target).square().mean()

    def hidden(self) -> list[dict[str, Tensor]]:
        return [dict(self.teachers[0].state_dict()), dict(self.helper.net.state_dict())]


def test_hidden_networks_are_as_without_the_guard(tmp_path: Path) -> None:
    """A trial leaves no trace in their running statistics, and a skipped batch neither."""
    data, ends = batches(count=120), []
    for number, guards in enumerate(([], [NaNGuard(act_on="evidence")])):
        torch.manual_seed(0)
        run = fit(HidesTeachers(), data, *guards, folder=tmp_path / str(number))
        ends.append(run.module.hidden())  # type: ignore[operator]
    assert not differences(*ends)
    assert guards[0].summary().count("trial") == 1

    ends, guard = [], NaNGuard()
    bad = [with_nan(batch) if index == 5 else batch for index, batch in enumerate(data[:20])]
    good = [batch for index, batch in enumerate(data[:20]) if index != 5]
    for number, (given, guards) in enumerate(((bad, [guard]), (good, []))):
        torch.manual_seed(0)
        run = fit(HidesTeachers(), given, *guards, folder=tmp_path / f"bad{number}")
        ends.append(run.module.hidden())  # type: ignore[operator]
    assert words(guard) == [("skip",)]
    assert not differences(*ends)
