"""Chance: bad updates that come at random, in stretches or by the draw cost what is skipped, and nothing else."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from lightning_nanguard import Budget, NaNGuard, TrainingDivergedError
from lightning_nanguard.measure.readings import PendingReading
from tests.helpers import Batch, FaultAt, Task, batches, data_for, differences, fit, learner_of, task, with_nan, words

NAN = math.nan
READBACKS = ["step", "deferred"]


def adam(parameters: list[nn.Parameter], **options: Any) -> optim.Optimizer:
    return optim.Adam(parameters, 0.01, **options)


@pytest.fixture(autouse=True)
def _late(monkeypatch: pytest.MonkeyPatch) -> None:
    # Readings of deferred readback arrive as late as they may.
    monkeypatch.setattr(PendingReading, "arrived", lambda self: False)


def end_of(module: Task, data: list[Batch]) -> float:
    """Mean loss over some batches."""
    with torch.no_grad():
        return sum(float((module.net(x) - y).square().mean()) for x, y in data) / len(data)


def gains(guarded: Task, twin: Task, data: list[Batch]) -> float:
    """Share that the guarded run has of what its twin without bad batches has gained."""
    torch.manual_seed(0)
    before = end_of(task("norm"), data)
    return (before - end_of(guarded, data)) / (before - end_of(twin, data))


@pytest.mark.parametrize("readback", READBACKS)
def test_half_of_all_updates_are_bad(readback: str, tmp_path: Path) -> None:
    """Which ones is chance: the run goes on to its end, only skips, and learns."""
    data = data_for("norm", 300)
    bad = set(random.Random(1).sample(range(300), 150))
    spoiled = [with_nan(batch) if index in bad else batch for index, batch in enumerate(data)]
    guard = NaNGuard(snapshot_every_n_steps=10, readback=readback)
    run = fit(task("norm", lambda p: adam(p, fused=True)), spoiled, guard, folder=tmp_path)
    twin = fit(task("norm", adam), data, folder=tmp_path)
    assert words(guard) == [("skip",)] * 150
    assert guard.lr_multiplier == 1.0
    assert run.trainer.global_step == 300
    assert gains(run.module, twin.module, data) > 0.8


@pytest.mark.parametrize("readback", READBACKS)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("begin", [0, 100])
def test_a_shard_of_forty_bad_batches_is_survived(begin: int, fused: bool, readback: str, tmp_path: Path) -> None:
    """Also where it comes first of all, and where bad updates are undone rather than kept from the weights."""
    data = data_for("norm", 200)
    shard = range(begin, begin + 40)
    spoiled = [with_nan(batch) if index in shard else batch for index, batch in enumerate(data)]
    guard = NaNGuard(snapshot_every_n_steps=10, readback=readback)
    run = fit(task("norm", lambda p: adam(p, fused=fused)), spoiled, guard, folder=tmp_path)
    twin = fit(task("norm", adam), data, folder=tmp_path)
    assert set(words(guard)) <= {("skip",), ("restore",)}
    assert sum(one == ("restore",) for one in words(guard)) <= (readback == "deferred" and not fused)
    assert guard.lr_multiplier == 1.0
    assert gains(run.module, twin.module, data) > 0.8


def test_a_shard_longer_than_the_user_allows_ends_the_run(tmp_path: Path) -> None:
    """``Budget(max_bad_batches=…)`` bounds bad updates in a row, in mid-run and from the start."""
    ends = []
    for begin in (0, 100):
        data = [with_nan(batch) if index >= begin else batch for index, batch in enumerate(data_for("norm", 160))]
        guard = NaNGuard(snapshot_every_n_steps=10, budget=Budget(max_bad_batches=20))
        with pytest.raises(TrainingDivergedError, match=r"the first 20 were all bad|21 updates in a row were bad"):
            fit(task("norm", adam), data, guard, folder=tmp_path)
        ends.append(guard.interventions[-1].batch_idx - begin)
    assert ends == [19, 20]


class Spoken(Task):
    """CTC over sequences of six."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4)), adam)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        x, targets, lengths = batch
        logits = self.net(x).log_softmax(-1).transpose(0, 1)
        return nn.functional.ctc_loss(logits, targets, torch.full((len(x),), x.shape[1]), lengths)


def spoken() -> list[Any]:
    """Batches in which a target is longer than its input four times of five."""
    draw, chance = torch.Generator().manual_seed(0), random.Random(0)
    made = []
    for _ in range(400):
        targets = torch.stack([torch.randperm(3, generator=draw) + 1 for _ in range(8)])
        x = nn.functional.one_hot(targets, 4).float().repeat_interleave(2, dim=1)
        x = x + 0.1 * torch.randn(x.shape, generator=draw)
        targets, lengths = targets.repeat(1, 3), torch.full((8,), 3)
        if chance.random() < 0.8:
            lengths[chance.randrange(8)] = 9
        made.append((x, targets, lengths))
    return made


def test_an_infinite_loss_in_four_of_five_batches(tmp_path: Path) -> None:
    """Skipping alone carries the run to where one gets whose data lack such batches, to the bit."""
    data = spoken()
    good = [batch for batch in data if int(batch[2].max()) <= 6]
    guard = NaNGuard(snapshot_every_n_steps=10)
    runs = []
    for shown, guarding in ((good, None), (data, guard)):
        torch.manual_seed(0)
        runs.append(fit(Spoken(), shown, guarding, folder=tmp_path))
    assert len(good) < 100
    assert words(guard) == [("skip",)] * (len(data) - len(good))
    one, other = (learner_of(run.trainer, run.module) for run in runs)
    assert differences(one["parameters"], other["parameters"]) == []
    x, targets, _ = data[0]
    assert (runs[1].module.net(x).argmax(-1)[:, ::2] == targets[:, :3]).float().mean() > 0.95


class Drawn(Task):
    """Its loss is not finite in nearly half of the random draws, whatever the batch and the weights."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        draw = torch.rand(())
        zero = torch.where(draw > 0.45, torch.ones(()), torch.zeros(()))
        return super().training_step(batch, batch_idx) * (zero / zero)


@pytest.mark.parametrize("readback", READBACKS)
def test_a_fault_of_the_draw_never_costs_the_rate(readback: str, tmp_path: Path) -> None:
    """A loss that is NaN in 45 % of the draws is skipped where it is, and nothing else is done."""
    torch.manual_seed(0)
    module = Drawn(nn.Linear(6, 2), lambda p: adam(p, fused=True))
    guard = NaNGuard(readback=readback)
    run = fit(module, batches(count=300), guard, folder=tmp_path)
    assert set(words(guard)) == {("skip",)}
    assert 100 < len(guard.interventions) < 170
    assert (guard.lr_multiplier, guard.clip_val) == (1.0, None)
    assert run.trainer.global_step == 300


def test_faults_at_random_of_a_run_that_draws(tmp_path: Path) -> None:
    """A loss that is bad for its batch is told from one of the draw: it is skipped as well, under dropout."""
    guard = NaNGuard(snapshot_every_n_steps=10)
    bad = random.Random(2).sample(range(200), 80)
    run = fit(task("cnn", adam), data_for("cnn", 200), guard, folder=tmp_path, callbacks=[FaultAt("loss", NAN, bad)])
    assert words(guard) == [("skip",)] * 80
    assert guard.lr_multiplier == 1.0
    assert run.trainer.global_step == 200
