"""A window of accumulation with a bad micro-batch is made again without it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_nanguard import NaNGuard
from tests.helpers import Batch, FaultAt, batches, differences, fit, learner_of, task, with_nan, words
from tests.trainer.faulty_steps import NAN, Fault, Faulty, Sees, left_behind, train


class LeavesOut(Faulty):
    """The run to compare with: of bad micro-batches it only draws the random numbers, and it makes the mean of the
    others. A count of steps goes on."""

    bad: tuple[int, ...] = ()

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        if batch_idx not in self.bad:
            return super().training_step(batch, batch_idx)
        self.net[3](torch.zeros(len(batch[0]), 8))
        random.random()
        np.random.rand()
        self.steps += 1
        return None

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        window = range(3 * (self.fault.batch // 3), self.fault.batch + 1)
        good = sum(index not in self.bad for index in window)
        for parameter in self.parameters():
            if parameter.grad is not None and good < len(window):
                parameter.grad.mul_(len(window) / good)


class BadGradient(torch.autograd.Function):
    """Gives its input, and a gradient of NaN where a sample is marked."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, marked: Tensor) -> Tensor:
        ctx.marked = marked
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return gradient * (NAN if bool(ctx.marked) else 1.0), None


class Marked(Faulty):
    """A finite loss without a finite gradient, for batches with a marked sample."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return BadGradient.apply(loss, (batch[0] == 77.0).any())


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("bad", [(3,), (4,), (5,), (3, 4), (4, 5), (0, 4, 10)])
def test_a_bad_micro_batch_costs_itself(bad: tuple[int, ...], kind: str, tmp_path: Path) -> None:
    """The update of its window is the mean of the good ones; batch norm, metrics, means, attributes and random streams
    are as if it had never been run, wherever in the window it stands."""
    data = batches(count=11)
    for index in bad:
        x = data[index][0].clone()
        x[1] = NAN if kind == "loss" else 77.0
        data[index] = x, data[index][1]
    options: dict[str, Any] = {"folder": tmp_path, "accumulate_grad_batches": 3}
    ends = []
    guard = NaNGuard()
    for module, guarded in ((LeavesOut(None), None), (Marked(None) if kind == "gradient" else Faulty(None), guard)):
        module.bad = bad  # type: ignore[attr-defined]
        sees = Sees()
        run = fit(module, data, guarded, callbacks=[sees], **options)
        left = left_behind(run, sees, calls=False)
        # What was logged step by step may hold the loss of the bad micro-batch, as its output does.
        for name in ("logged", "logged_metrics", "progress_bar_metrics", "callback_metrics"):
            left[name] = [value for key, value in dict(left[name]).items() if key == "loss_epoch" or key == "metric"]
        ends.append(left)
    assert differences(*ends) == []
    assert words(guard) == [("leave out",)] * len(bad)
    assert [one.batch_idx for one in guard.interventions] == list(bad)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_window_without_a_good_micro_batch_is_skipped(tmp_path: Path) -> None:
    """Nothing is left to make an update from, and nothing else is lost."""
    data = [with_nan(batch) if 3 <= index < 6 else batch for index, batch in enumerate(batches(count=12))]
    guard = NaNGuard()
    guarded = fit(Faulty(None), data, guard, folder=tmp_path, accumulate_grad_batches=3)
    assert words(guard) == [("skip",)]
    module = LeavesOut(None)
    module.bad = (3, 4, 5)
    never = fit(module, data, folder=tmp_path, accumulate_grad_batches=3)
    assert differences(learner_of(guarded.trainer, guarded.module), learner_of(never.trainer, never.module)) == []


def test_a_transient_fault_in_a_window(tmp_path: Path) -> None:
    """A gradient that is bad once is found at the window's end, and the window is made again: bit for bit."""
    healthy = train(None, tmp_path, accumulate_grad_batches=3)[0]
    for at in (3, 4, 5):
        guard = NaNGuard()
        left, _ = train(Fault("gradient", (at,)), tmp_path, guard=guard, accumulate_grad_batches=3)
        assert words(guard) == [("redo",)]
        assert differences(left, healthy) == []


def test_a_window_that_is_too_large_to_keep_is_skipped(tmp_path: Path) -> None:
    """Its batches would hold more memory than is allowed."""
    from dataclasses import replace

    from lightning_nanguard.thresholds import BatchesThresholds, Thresholds
    from lightning_nanguard.thresholds.batches import RepeatedStepsThresholds

    few = replace(BatchesThresholds(), repeated=RepeatedStepsThresholds(window_bytes=300))
    data = [with_nan(batch) if index == 5 else batch for index, batch in enumerate(batches(count=12))]
    guard = NaNGuard(thresholds=Thresholds(batches=few))
    fit(Faulty(None), data, guard, folder=tmp_path, accumulate_grad_batches=3)
    assert words(guard) == [("skip",)]


@pytest.mark.parametrize("at", [40, 41, 43])
def test_a_huge_finite_micro_batch_is_left_out_alone(at: int, tmp_path: Path) -> None:
    """A loss of 1e30 in a window costs its micro-batch: the others begin with the numbers and flags they began with."""
    guard = NaNGuard(snapshot_every_n_steps=3)
    fault = FaultAt("loss", 1e30, at)
    fit(task(), batches(count=60), guard, folder=tmp_path, callbacks=[fault], accumulate_grad_batches=4)
    assert words(guard) == [("leave out",)]
    assert guard.interventions[0].batch_idx == at
