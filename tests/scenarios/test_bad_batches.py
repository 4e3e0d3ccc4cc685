"""A bad batch costs itself and nothing else, in every way to train."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from torch import nn, optim
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_nanguard import (
    Budget,
    NaNGuard,
    Thresholds,
)
from tests.helpers import (
    ONCE,
    FaultAt,
    data_for,
    differences,
    fit,
    samples,
    task,
    with_nan,
    words,
)
from tests.scenarios.struck import INF, NAN, STEPS, WAYS, adam, assert_sound, batch_of, struck
from tests.scenarios.test_skips import left_behind

AT = (0, 12, 30)
FAULTS = [
    (kind, value)
    for kind in ("loss", "gradient", "input", "target")
    for value in (NAN, INF, 1e30)
    if (kind, value) != ("input", 1e30)
]


@pytest.mark.parametrize(("kind", "value"), FAULTS)
@pytest.mark.parametrize("way", WAYS)
def test_bad_batch(way: str, kind: str, value: float, tmp_path: Path) -> None:
    """A bad loss, gradient, sample or target costs its batch and nothing else: one skip, no rollback, no cut; in the
    first update, early, and in mid-run. Under accumulation it costs its micro-batch alone."""
    guard = NaNGuard(snapshot_every_n_steps=5)
    run = struck(way, FaultAt(kind, value, [batch_of(way, step) for step in AT]), guard, tmp_path)
    assert_sound(run, guard)
    # A gradient is looked at once a window, when the fault of an earlier micro-batch is gone; a finite loss that is far
    # too large shows in it alone.
    expected = {("skip",)} if way != "accumulation" else {("redo",)} if kind == "gradient" else {("leave out",)}
    finite = {("skip",)} if kind == "loss" and math.isfinite(value) else set()
    assert expected <= set(words(guard)) <= expected | finite
    # Each skip belongs to one of the updates; both optimizers of manual optimization may name the same batch.
    seen = [step for step in AT for found in guard.interventions if found.batch_idx // batch_of(way, 1) == step]
    assert len(seen) == len(guard.interventions)
    assert all(1 <= seen.count(step) <= (2 if way == "manual" or len(expected | finite) == 2 else 1) for step in AT)
    for found in guard.interventions:
        assert found.snapshot_step is None
        assert found.fault in ("non_finite_loss", "non_finite_gradient", "gradient_overflow", "gradient_spike")
    for first in (guard.interventions[seen.index(step)] for step in AT):
        if kind == "gradient" and not math.isfinite(value):
            assert (first.fault, first.place) == ("non_finite_gradient", "gradient of net.0.weight")
        elif not math.isfinite(value):
            assert (first.fault, first.place) == ("non_finite_loss", "loss")
        if kind in ("input", "target") and not math.isfinite(value) and way != "accumulation":
            assert first.cause == "non_finite_input"


@pytest.mark.parametrize("step", AT)
@pytest.mark.parametrize("way", WAYS)
def test_huge_input_that_does_not_show_in_the_loss(way: str, step: int, tmp_path: Path) -> None:
    """Batch norm and tanh make a finite loss and a harmless gradient of an input of 1e30; at most its statistics
    overflow, and are put back."""
    guard = NaNGuard(snapshot_every_n_steps=5)
    run = struck(way, FaultAt("input", 1e30, batch_of(way, step)), guard, tmp_path)
    assert_sound(run, guard)
    # Updates since the state of the start cannot be made again before a second loss was the same.
    assert words(guard) == ([] if way == "manual" else [("restore",) if step == 0 else ("restore", "redo")])


@pytest.mark.parametrize("value", [NAN, INF, 1e30])
def test_loss_that_is_bad_only_once(value: float, tmp_path: Path) -> None:
    """A loss that is bad at its first look and fine at the second costs nothing: the step is made again."""
    guard = NaNGuard(snapshot_every_n_steps=5)
    run = struck("automatic", FaultAt("flash", value, AT), guard, tmp_path)
    assert_sound(run, guard)
    assert len(guard.interventions) == 3
    assert set(words(guard)) == {("redo",)}


@pytest.mark.parametrize("readback", ["step", "deferred"])
@pytest.mark.parametrize("kind", ["loss", "gradient", "input"])
@pytest.mark.parametrize("optimizer", ["fused", "foreach"])
def test_bad_batch_read_late(optimizer: str, kind: str, readback: Any, tmp_path: Path) -> None:
    """Read late, a bad batch is skipped on the device or undone: the weights end finite and the rate is kept."""
    guard = NaNGuard(snapshot_every_n_steps=5, readback=readback)
    fault = FaultAt(kind, NAN, 30)

    def make(parameters: list[nn.Parameter]) -> Optimizer:
        return optim.AdamW(parameters, lr=0.01, **{optimizer: True})

    run = fit(task("norm", make), data_for("norm", STEPS), guard, folder=tmp_path, callbacks=[fault])
    assert_sound(run, guard)
    assert len(guard.interventions) == 1
    held_back = optimizer == "fused" or readback == "step"
    assert words(guard)[0] == (("skip",) if held_back else ("restore",))


def test_corrupt_sample_of_every_epoch(tmp_path: Path) -> None:
    """A sample that is corrupt in every epoch is skipped each time it comes, wherever it comes, and the rate stays."""
    data = data_for("norm", 10)
    guard = NaNGuard(snapshot_every_n_steps=5)
    loader = DataLoader(samples([with_nan(data[0]), *data[1:]]), batch_size=8, shuffle=True)
    run = fit(task("norm", adam), loader, guard, folder=tmp_path, max_epochs=6)
    assert_sound(run, guard)
    assert words(guard) == [("skip",)] * 6
    assert [found.epoch for found in guard.interventions] == list(range(6))
    assert all(found.cause == "non_finite_input" for found in guard.interventions)


def test_rare_faults_do_not_use_the_budget_up(tmp_path: Path) -> None:
    """Twelve bad batches and state faults, spread over a long run, are within a small budget for a short window."""
    guard = NaNGuard(
        snapshot_every_n_steps=5, budget=Budget(max_rollbacks=1, max_bad_batches=1, max_skip_share=0.2, window=20)
    )
    faults = [FaultAt("loss", NAN, range(10, 300, 50)), FaultAt("weight", NAN, range(35, 300, 50))]
    run = fit(task("mlp", adam), data_for("mlp", 300), guard, folder=tmp_path, callbacks=faults)
    assert_sound(run, guard)
    assert words(guard) == [("skip",), ("restore", "redo")] * 6


@pytest.mark.parametrize("thresholds", [None, ONCE], ids=["again", "once"])
@pytest.mark.parametrize("model", ["mlp", "manual"])
def test_a_finite_fault_in_the_first_batch(model: str, thresholds: Thresholds | None, tmp_path: Path) -> None:
    """Nothing came before that the first batch could be told by: the third tells it, and the run starts anew behind it,
    as if the three had never been. When it comes back it is skipped."""
    data = data_for(model, 40)
    bad = (data[0][0], data[0][1] * 1e15)
    guard = NaNGuard(thresholds=thresholds, snapshot_every_n_steps=5, act_on="evidence")
    guarded = fit(task(model, adam), [bad, *data[1:20], bad, *data[20:]], guard, folder=tmp_path)
    assert words(guard)[0] == ("restore",)
    assert set(words(guard)[1:]) == {("skip",)}
    assert guard.lr_multiplier == 1.0
    if model == "mlp":
        never = fit(task(model, adam), data[3:], folder=tmp_path)
        one, other = left_behind(guarded), left_behind(never)
        for part in ("parameters", "optimizers"):
            assert differences(one[part], other[part]) == []
