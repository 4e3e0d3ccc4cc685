"""A batch that the user's own code leaves out for its NaN is left out of running statistics, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging
from torch import Tensor
from torch.optim import SGD

from lightning_nanguard import NaNGuard
from tests.helpers import Batch, Task, batches, differences, fit, learner_of, mlp, with_nan, words

BAD = (8, 15)  # the first and the last of a window of accumulation


def data() -> list[Batch]:
    return [with_nan(batch) if index in BAD else batch for index, batch in enumerate(batches(count=24))]


class LeavesOut(Task):
    """Makes no update from a batch whose loss is not finite; by hand it also puts buffers back."""

    def __init__(self, *, by_hand: bool) -> None:
        super().__init__(mlp(norm=True))
        self.by_hand = by_hand

    def checked(self, batch: Batch) -> Tensor | None:
        before = [buffer.clone() for buffer in self.buffers()]
        x, y = batch
        loss = (self.net(x) - y).square().mean()
        if bool(torch.isfinite(loss)):
            return loss
        if self.by_hand:
            for buffer, held in zip(self.buffers(), before, strict=True):
                buffer.copy_(held)
        return None


class GivesNone(LeavesOut):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return self.checked(batch)


class StepsByHand(LeavesOut):
    def __init__(self, *, by_hand: bool) -> None:
        super().__init__(by_hand=by_hand)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        loss, optimizer = self.checked(batch), self.optimizers()
        if loss is not None:
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()


class OwnOptimizerStep(LeavesOut):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = self.checked(batch)
        return torch.zeros((), requires_grad=True) * float("nan") if loss is None else loss

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        loss = optimizer_closure()
        if bool(torch.isfinite(loss)):
            optimizer.step(closure=lambda: loss)


WAYS: dict[str, tuple[Callable[..., LeavesOut], int]] = {
    "no loss": (GivesNone, 1),
    "no loss in a window": (GivesNone, 4),
    "no step": (StepsByHand, 1),
    "no step in optimizer_step": (OwnOptimizerStep, 1),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_statistics_stay_good(way: str, tmp_path: Path) -> None:
    """Batch norm's statistics are put back and the cause is on record; no update is lost and no rate is cut."""
    make, window = WAYS[way]
    options = {"accumulate_grad_batches": window} if window > 1 else {}
    torch.manual_seed(0)
    alone = fit(make(by_hand=True), data(), folder=tmp_path, **options)
    torch.manual_seed(0)
    guard = NaNGuard()
    run = fit(make(by_hand=False), data(), guard, folder=tmp_path, **options)

    assert not differences(learner_of(alone.trainer, alone.module), learner_of(run.trainer, run.module))
    assert words(guard) == [("undo",)] * len(BAD)
    assert [found.batch_idx for found in guard.interventions] == list(BAD)
    for found in guard.interventions:
        assert (found.fault, found.cause, found.lr_after) == ("non_finite_statistics", "non_finite_input", 0.01)


class LosesStatistics(LeavesOut):
    """A running mean becomes NaN, which the guard finds just before the first bad batch. Bad inputs are left out."""

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if batch_idx == BAD[0] - 3:
            next(buffer for name, buffer in self.net.named_buffers() if "running_mean" in name).fill_(float("nan"))

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        x, y = batch
        loss = (self.net(x) - y).square().mean()
        return loss if bool(torch.isfinite(x).all()) else None


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_the_record_after_a_rollback(tmp_path: Path) -> None:
    """The record of an undone batch names no snapshot, even if the run was rolled back just before."""
    guard = NaNGuard(snapshot_every_n_steps=2)
    fit(LosesStatistics(by_hand=False), data(), guard, folder=tmp_path)
    back, *undone = guard.interventions
    assert (back.batch_idx, back.remedies, back.snapshot_step) == (BAD[0] - 1, ("restore", "redo"), 4)
    assert [(one.remedies, one.snapshot_step, one.updates_lost) for one in undone] == [(("undo",), None, 0)] * len(BAD)


def test_observing_changes_nothing(tmp_path: Path) -> None:
    """With ``observe=True`` the statistics stay as the batch has left them."""
    torch.manual_seed(0)
    guard = NaNGuard(observe=True)
    run = fit(StepsByHand(by_hand=False), data(), guard, folder=tmp_path)
    assert any(not bool(torch.isfinite(buffer).all()) for buffer in run.module.buffers())
    assert ("undo",) not in words(guard)


def test_the_pass_for_averaged_weights(tmp_path: Path) -> None:
    """Stochastic weight averaging ends with a pass that only fills statistics: a bad batch in it costs itself alone."""
    ends = []
    for given in (data(), [batch for index, batch in enumerate(data()) if index not in BAD]):
        torch.manual_seed(0)
        module = Task(mlp(norm=True), lambda parameters: SGD(parameters, lr=0.01))
        average = StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1)
        run = fit(module, given, NaNGuard(), folder=tmp_path, max_epochs=3, callbacks=[average])
        ends.append(learner_of(run.trainer, module))
    assert not differences(ends[0], ends[1])
