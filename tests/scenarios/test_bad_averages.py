"""Averages that are bad, of weights or of statistics, are restored alone: no update is lost, no run ends for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from torch import Tensor

from lightning_nanguard import NaNGuard
from lightning_nanguard.thresholds import BatchesThresholds, Thresholds
from lightning_nanguard.thresholds.batches import RepeatedStepsThresholds
from tests.helpers import FaultAt, Run, copied, data_for, differences, fit, state_of, task, words
from tests.scenarios.struck import INF, NAN, adam

STEPS, EVERY = 60, 5


class Ema(Callback):
    """A user's average of the weights, which goes bad at some batches, or at each from one on.

    Args:
        bad: The batches after which it holds a bad number.
        value: That number.
    """

    def __init__(self, bad: range | tuple[int, ...], value: float = NAN) -> None:
        self.bad, self.value = bad, value
        self.ema: dict[str, Tensor] = {}
        self.after: dict[int, dict[str, Tensor]] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.ema = {name: parameter.detach().clone() for name, parameter in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.after[batch_idx] = copied(self.ema)  # as the guard, which comes first, has left it
        for name, parameter in pl_module.named_parameters():
            self.ema[name].mul_(0.9).add_(parameter.detach(), alpha=0.1)
        if batch_idx in self.bad:
            next(iter(self.ema.values())).view(-1)[0] = self.value


def run_with(guard: NaNGuard | None, folder: Path, *others: Callback, model: str = "norm", **options: Any) -> Run:
    make = options.pop("optimizer", adam)
    data = data_for(model, STEPS)
    return fit(task(model, make), data, guard, folder=folder, val=data[:1], callbacks=[*others], **options)


@pytest.mark.parametrize("readback", ["step", "deferred"])
def test_an_average_that_is_bad_again_and_again_costs_the_run_nothing(readback: str, tmp_path: Path) -> None:
    """Whatever becomes of a user's average, the run ends to the bit as it does without a guard, and snapshots go on
    being certified, so that a weight that is lost later costs a few updates only."""
    bare = run_with(None, tmp_path / "bare", Ema(range(STEPS)))
    guard = NaNGuard(snapshot_every_n_steps=EVERY, readback=readback)
    guarded = run_with(guard, tmp_path / "guarded", Ema(range(STEPS)))
    assert differences(state_of(bare), state_of(guarded)) == []
    assert set(words(guard)) == {("restore averages",)}
    assert {one.fault for one in guard.interventions} == {"corrupted_state"}
    assert guard.lr_multiplier == 1.0

    guard = NaNGuard(snapshot_every_n_steps=EVERY, readback=readback)
    lost = FaultAt("weight", NAN, 50)
    run_with(guard, tmp_path / "lost", Ema(range(STEPS)), lost)
    [back] = [one for one in guard.interventions if "restore" in one.remedies]
    assert back.snapshot_step is not None
    assert back.snapshot_step >= 50 - 2 * EVERY - 4


@pytest.mark.parametrize("value", [NAN, INF, 1e30])
@pytest.mark.parametrize("model", ["norm", "manual"])
def test_an_average_that_went_bad_once(model: str, value: float, tmp_path: Path) -> None:
    """It comes back bitwise from the snapshot and goes on averaging, and everything else is as without the fault."""
    bare = run_with(None, tmp_path / "bare", Ema(()), model=model)
    ema, guard = Ema((31,), value), NaNGuard(snapshot_every_n_steps=EVERY)
    guarded = run_with(guard, tmp_path / "guarded", ema, model=model)
    assert differences(state_of(bare), state_of(guarded)) == []
    [found] = guard.interventions
    assert found.remedies == ("restore averages",)
    assert "in the averaged copy of Ema.ema" in found.place
    assert found.updates_lost == 0
    back = ema.after[found.batch_idx]
    assert any(differences(back, ema.after[step]) == [] for step in range(31 - 2 * EVERY, 32))
    assert all(bool(torch.isfinite(one).all()) for one in ema.ema.values())


@pytest.mark.parametrize("readback", ["step", "deferred"])
def test_a_bad_batch_is_still_skipped_where_an_average_is_bad(readback: str, tmp_path: Path) -> None:
    """The average says nothing about the batch or the weights: those are judged as they are without it."""
    seen = {}
    for name, bad in (("sound", ()), ("bad", range(30, STEPS))):
        guard = NaNGuard(snapshot_every_n_steps=EVERY, readback=readback)
        seen[name] = run_with(guard, tmp_path / name, Ema(bad), FaultAt("loss", NAN, 40))
        assert guard.lr_multiplier == 1.0
        assert ("skip" in {word for one in words(guard) for word in one}) is (readback == "step")
    if readback == "step":
        assert differences(state_of(seen["sound"]), state_of(seen["bad"])) == []


class Statistic(Callback):
    """Spoils one number of running statistics after a batch.

    Args:
        name: Which statistics.
        value: What the number becomes.
        frozen: Whether the layer normalises by these statistics in training, too.
    """

    def __init__(self, name: str, value: float, *, frozen: bool = False) -> None:
        self.name, self.value, self.frozen = name, value, frozen

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.net[1].train(not self.frozen)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 30:
            getattr(pl_module.net[1], self.name)[2] = self.value


AGAIN = Thresholds(batches=BatchesThresholds(repeated=RepeatedStepsThresholds(updates_again=0)))
"""Without updates that are made again."""


@pytest.mark.parametrize(("name", "value"), [("running_mean", NAN), ("running_var", NAN), ("running_var", -0.5)])
def test_running_statistics_that_went_bad_alone(name: str, value: float, tmp_path: Path) -> None:
    """In training a layer normalises by the batch. So weights, moments and all other statistics are as without the
    fault, and only the bad number comes from the snapshot. Where the layer uses its statistics, the run goes back."""
    bare = run_with(None, tmp_path / "bare")
    guard = NaNGuard(snapshot_every_n_steps=EVERY, thresholds=AGAIN)
    guarded = run_with(guard, tmp_path / "guarded", Statistic(name, value))
    [found] = guard.interventions
    assert (found.fault, found.remedies, found.updates_lost) == ("corrupted_state", ("restore averages",), 0)
    assert found.place.endswith(f"buffer net.1.{name}")
    different = differences(state_of(bare), state_of(guarded))
    assert [one for one in different if "running_" not in one and "val" not in one] == []
    mine, sound = (dict(run.module.named_buffers())[f"net.1.{name}"] for run in (guarded, bare))
    assert (mine != sound).nonzero().flatten().tolist() in ([], [2])
    assert bool(torch.isfinite(mine.sqrt() if name == "running_var" else mine).all())

    guard = NaNGuard(snapshot_every_n_steps=EVERY, thresholds=AGAIN)
    run_with(guard, tmp_path / "frozen", Statistic(name, value, frozen=True))
    assert not any("restore averages" in one.remedies for one in guard.interventions)
    assert any("restore" in one.remedies for one in guard.interventions)
