"""Batches are seen and run again without a trace in the run."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from torch import nn, optim

from lightning_nanguard import DivergingLoss, Fault, NaNGuard, NonFinite
from lightning_nanguard.detect.base import Detector
from lightning_nanguard.measure.readings import PendingReading
from lightning_nanguard.trainer.batch_replay import TrainerBatchReplay
from tests.helpers import (
    FaultAt,
    Task,
    data_for,
    differences,
    fit,
    state_of,
    task,
    with_nan,
    words,
)
from tests.scenarios.struck import NAN, adam
from tests.trainer.test_identity import DrawsEverywhere


def test_a_batch_that_comes_back_is_not_compared_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is bad for the same reason in every epoch is looked into at first, then more and more rarely; each
    is skipped and on record all the same."""
    looks: list[bool] = []
    probe = TrainerBatchReplay.probe

    def counted(self: TrainerBatchReplay, *, redrawn: bool = False) -> float | None:
        looks.append(redrawn)
        return probe(self, redrawn=redrawn)

    monkeypatch.setattr(TrainerBatchReplay, "probe", counted)
    bad = list(range(10, 400, 10))
    guard = NaNGuard(snapshot_every_n_steps=5)
    fault = FaultAt("loss", NAN, bad)
    fit(task("norm", adam), data_for("norm", 400), guard, folder=tmp_path, callbacks=[fault])
    assert words(guard) == [("skip",)] * len(bad)
    assert len({(one.fault, one.cause) for one in guard.interventions}) == 1
    # Under the present weights, with other random numbers, and under the last good weights.
    assert looks == [False, True, False] * len([n for n in range(len(bad)) if n <= 4 or n & (n - 1) == 0])


def fused(parameters: list[nn.Parameter]) -> optim.Optimizer:
    return optim.AdamW(parameters, lr=0.01, fused=True)


def plain(parameters: list[nn.Parameter]) -> optim.Optimizer:
    return optim.AdamW(parameters, lr=0.01)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readings arrive as late as they may, as from a device that is far behind."""
    monkeypatch.setattr(PendingReading, "arrived", lambda self: False)


class Kept(Callback):
    """Notes the batches that a rehearsal would be made on."""

    def __init__(self, guard: NaNGuard) -> None:
        self.guard, self.seen = guard, set[int]()

    def on_train_batch_end(self, *_: Any) -> None:
        assert self.guard._fit is not None
        self.seen |= {index for _, index in self.guard._fit.replay.batches.healthy}


@pytest.mark.parametrize("make", [fused, plain], ids=["fused", "plain"])
@pytest.mark.parametrize("arrives", ["late", "soon"])
def test_nothing_is_rehearsed_on_a_bad_batch(
    arrives: str, make: Callable[..., Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Only batches that are known to be healthy are kept, whenever a fault is heard of."""
    if arrives == "late":
        request.getfixturevalue("late")
    bad = [8, 12, 15, 16]
    guard = NaNGuard(readback="deferred")
    kept = Kept(guard)
    data = [with_nan(batch) if index in bad else batch for index, batch in enumerate(data_for("mlp", 40))]
    fit(task("mlp", make), data, guard, folder=tmp_path, callbacks=[kept])
    assert len(kept.seen) > 20
    assert kept.seen.isdisjoint(bad)


class Wary(Detector):
    """Suspects the learner at every step, always wrongly."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def check(self, reading: Any) -> Fault | None:
        return Fault("wary", "learner", "loss", reading.loss, "no reason at all")


@pytest.mark.parametrize("make", [DrawsEverywhere, lambda: task("cnn", metric=True)], ids=["draws", "cnn"])
def test_a_suspicion_that_proves_wrong_leaves_no_trace(make: Callable[[], Task], tmp_path: Path) -> None:
    """The guard looks at a batch a second time to judge a suspicion; when it finds nothing the run is the same."""
    ended = []
    for guard in (None, NaNGuard([NonFinite(), Wary()], snapshot_every_n_steps=3)):
        torch.manual_seed(3)
        module = make()
        data = data_for("norm" if isinstance(module, DrawsEverywhere) else "cnn")
        ended.append(state_of(fit(module, data, guard, folder=tmp_path, max_epochs=2)))
        if guard is not None:
            assert list(guard.interventions) == []
    assert differences(*ended) == []


def test_noisy_loss_that_alarms_a_touchy_detector_is_left_alone(tmp_path: Path) -> None:
    """A loss that jumps by orders of magnitude from the data's side is looked into and the run stays the same."""
    data = [(x, y * (300.0 if i % 7 > 4 else 1.0)) for i, (x, y) in enumerate(data_for("mlp", 60))]
    guard = NaNGuard([NonFinite(), DivergingLoss(patience=16)], snapshot_every_n_steps=3, act_on="evidence")
    adam = functools.partial(optim.Adam, lr=0.01)
    bare = fit(task("mlp", adam), data, folder=tmp_path)
    guarded = fit(task("mlp", adam), data, guard, folder=tmp_path)
    assert list(guard.interventions) == []
    assert differences(state_of(bare), state_of(guarded)) == []


# Draw and loss of each run of a step; what a module holds itself is put back after a batch was run again.
DRAWN: list[tuple[float, float]] = []


class Still(optim.SGD):
    """Changes nothing, whatever the gradient."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return closure() if closure is not None else None


class Draws(Task):
    """Its loss depends on a random draw, and its gradient is not finite in half of the draws."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        draw = torch.rand(())
        loss = super().training_step(batch, batch_idx) * (1 + draw)
        DRAWN.append((float(draw), float(loss.detach())))
        if draw > 0.5:
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss


class RunsAgain(Callback):
    """Runs each batch again before its update, and notes whether it came out as in the step."""

    def __init__(self, guard: NaNGuard) -> None:
        self.guard, self.same = guard, list[bool]()

    def on_before_optimizer_step(self, *_: Any) -> None:
        assert self.guard._fit is not None
        replay, stream, (draw, loss) = self.guard._fit.replay, torch.get_rng_state(), DRAWN[-1]
        whole = fmean(loss for _, loss in DRAWN[-len(replay.batches.newest()) :])
        same = replay.probe() == loss and replay.gradient_finite() is (draw <= 0.5)
        with replay.rehearsing():
            same = same and replay.loss_at_hand() == whole
        self.same.append(same and torch.equal(torch.get_rng_state(), stream))


@pytest.mark.parametrize("window", [1, 2])
def test_a_batch_is_run_again_with_its_random_numbers(window: int, tmp_path: Path) -> None:
    """Under the same weights its loss is that of the step, that of a window is the mean over its steps, and its
    gradient is finite where that was; the stream of the run goes on as before."""
    DRAWN.clear()
    torch.manual_seed(0)
    guard = NaNGuard([], remedies=[], dirpath=tmp_path)
    again, module = RunsAgain(guard), Draws(task().net, Still)
    fit(module, data_for("mlp", 20), guard, callbacks=[again], folder=tmp_path, accumulate_grad_batches=window)
    assert again.same == [True] * (20 // window)
    assert {draw > 0.5 for draw, _ in DRAWN} == {True, False}


class Physics(Task):
    """Its loss is a derivative of its output."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return slope.square().mean()


def test_a_loss_that_needs_gradients_is_known_under_other_weights(tmp_path: Path) -> None:
    """Earlier batches can be compared although the step itself computes gradients."""
    losses: list[float | None] = []

    class Compares(Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            assert guard._fit is not None
            replay = guard._fit.replay
            with replay.rehearsing():
                losses.extend([*[one() for one in replay.earlier()], replay.loss_on(0)])

    guard = NaNGuard(dirpath=tmp_path)
    fit(Physics(task().net), data_for("mlp", 20), guard, callbacks=[Compares()], folder=tmp_path)
    assert len(losses) > 2
    assert all(loss is not None and math.isfinite(loss) for loss in losses)
