"""Averaged copies that callbacks keep."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import pytorch_lightning.callbacks as stock
import torch
from pytorch_lightning import Callback
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_nanguard import NaNGuard
from lightning_nanguard.thresholds.checkpoints import CheckpointsThresholds
from lightning_nanguard.trainer.private.averages import AveragedCopies, RepeatedAverages, swaps_weights
from tests.helpers import batches, fit, task


class KeepsEMA(Callback):
    def __init__(self, value: Any) -> None:
        self.kept = value


class Holder:
    def __init__(self, *callbacks: Callback) -> None:
        self.callbacks = callbacks


def module() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1), nn.Sequential(nn.Linear(1, 1).requires_grad_(False)))


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


NET = module()


@pytest.mark.parametrize(
    ("value", "counts"),
    [
        (copies(NET), True),
        ({f"module.{name}": tensor for name, tensor in copies(NET).items()}, True),
        (torch.optim.swa_utils.AveragedModel(NET), True),
        (list(copies(NET).values()), True),
        (list(copies(NET[:2]).values()), True),
        (copies(NET[0]), True),
        (copies(NET[1]), False),
        (NET, False),
        (dict(NET.named_parameters()), False),
        (MeanMetric(), False),
        ([torch.ones(3)], False),
        ({"loss": 1.0}, False),
        (["text"], False),
        (None, False),
    ],
)
def test_what_counts_as_a_copy(value: Any, counts: bool) -> None:
    """A module, dictionary or list with the shapes of the module, or of a part that holds half of what is trained; not
    the live module under another name, and nothing else."""
    found = AveragedCopies(Holder(Callback(), KeepsEMA(value)), NET)()
    assert list(found) == (["KeepsEMA.kept (1)"] if counts else [])


class Keeps(Callback):
    def __init__(self, value: Any) -> None:
        self.kept = value


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("MyEma", True),
        ("WeightAveraging", True),
        ("PolyakTeacher", True),
        ("BestWeights", False),
        ("Email", False),
        ("EMABest", False),
    ],
)
def test_what_is_called_an_average(name: str, counts: bool) -> None:
    """By a word of its callback's name or of its own."""
    callback = type(name, (Keeps,), {})(copies(NET))
    assert bool(AveragedCopies(Holder(callback), NET)()) == counts
    other = Keeps(None)
    setattr(other, name, copies(NET))
    assert bool(AveragedCopies(Holder(other), NET)()) == counts


def watched(net: nn.Module, change: Any, batches: int = 40) -> bool:
    """Whether what a callback keeps is taken for an average when ``change`` makes it anew at the end of each batch."""
    callback = Keeps(copies(net))
    known = AveragedCopies(Holder(callback), net)
    for batch in range(batches):
        known.watch()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
        change(callback, batch)
    return bool(known())


def test_an_average_is_known_by_its_changes() -> None:
    """In place or made anew, what changes from batch to batch and is not the weights is an average."""
    net = module()

    def in_place(callback: Keeps, batch: int) -> None:
        for mine, theirs in zip(callback.kept.values(), net.parameters(), strict=True):
            mine.lerp_(theirs.detach(), 0.1)

    def anew(callback: Keeps, batch: int) -> None:
        live = dict(net.named_parameters())
        callback.kept = {name: value.lerp(live[name].detach(), 0.1) for name, value in callback.kept.items()}

    assert watched(net, in_place)
    assert watched(net, anew)


def test_the_users_own_copies_are_none() -> None:
    """Copies of the weights are left alone: of each batch, of every third, of the first."""
    net = module()

    def every(batches: int, callback: Keeps, batch: int) -> None:
        if batch % batches == 0:
            callback.kept = copies(net)

    assert not watched(net, partial(every, 1))
    assert not watched(net, partial(every, 3))
    assert not watched(net, partial(every, 100))


def test_how_large_a_part_must_be() -> None:
    """The share of what is trained that a copy must cover is a threshold."""
    holder = Holder(KeepsEMA(copies(NET[1])))
    assert AveragedCopies(holder, NET, CheckpointsThresholds(averaged_copy_share=0.2))() != {}


def test_lazy_parameters_count_once_they_are_made() -> None:
    """Before the first forward a lazy layer has no shapes that a copy could have."""
    net = nn.Sequential(nn.Linear(1, 1), nn.LazyLinear(2))
    holder = Holder(KeepsEMA(copies(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 2)))))
    assert AveragedCopies(holder, net)() != {}  # of what there is
    net(torch.ones(1, 1))
    assert AveragedCopies(holder, net)() != {}


@pytest.mark.skipif(not hasattr(stock, "WeightAveraging"), reason="this Lightning has no WeightAveraging")
def test_who_swaps_weights() -> None:
    """WeightAveraging validates its average in the weights' place; other callbacks do not."""
    assert swaps_weights(Holder(Callback(), stock.WeightAveraging()))
    assert not swaps_weights(Holder(Callback()))


@pytest.mark.skipif(not hasattr(stock, "WeightAveraging"), reason="this Lightning has no WeightAveraging")
def test_averages_are_made_again_where_they_were_made(tmp_path: Path) -> None:
    """An update, or the end of an epoch, that the callback has averaged is averaged again, and no other one."""

    class Again(Callback):
        counts: ClassVar[list[int]] = []

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            again = RepeatedAverages(trainer)
            assert again.can_be_made_again(iter(()))
            for repeat, index in ((again.make_again, 3), (again.make_again, 4), (again.end_epoch_again, 0)):
                repeat(index)
                self.counts.append(int(average._average_model.n_averaged))
            again.end_epoch_again(1)
            self.counts.append(int(average._average_model.n_averaged))

    class Both(stock.WeightAveraging):
        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            return True

    average, sees = Both(), Again()
    fit(task(), batches(count=4), folder=tmp_path, callbacks=[sees, average])
    # Four updates and the end of the epoch; there was no update 5 and no second epoch.
    assert sees.counts == [6, 6, 7, 7]


class SpoilsWeight(Callback):
    """Makes a weight NaN in the second update of the last epoch."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == trainer.max_epochs - 1 and batch_idx == 1:
            next(pl_module.parameters()).data[0, 0] = torch.nan


@pytest.mark.parametrize("start", [1, 2])
def test_a_rollback_across_the_start_of_an_epoch_keeps_what_swa_averaged_there(start: int, tmp_path: Path) -> None:
    """The epoch does not start again, so the model that the run ends with is that of a run without the fault."""

    def run(guard: Any, *others: Callback) -> list[Tensor]:
        swa = stock.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=start)
        made = fit(task(), batches(), guard, callbacks=[*others, swa], folder=tmp_path, max_epochs=2)
        return [parameter.detach().clone() for parameter in made.module.parameters()]

    guard = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=64)
    guarded, sound = run(guard, SpoilsWeight()), run(None)
    assert [record.snapshot_step for record in guard.interventions] == [0]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(guarded, sound, strict=True))
