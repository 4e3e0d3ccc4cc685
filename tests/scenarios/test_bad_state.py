"""State that went bad by itself is named and restored, and nothing else is changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from torch import nn, optim
from torch.optim import Optimizer

from lightning_nanguard import Budget, NaNGuard, TrainingDivergedError
from tests.helpers import (
    ONCE,
    FaultAt,
    States,
    Task,
    batches,
    data_for,
    differences,
    fit,
    learner_of,
    mlp,
    non_finite,
    state_of,
    task,
    with_nan,
    words,
)
from tests.scenarios.struck import INF, NAN, STEPS, WAYS, adam, assert_sound, batch_of, struck

PLACES = {
    "weight": ["parameter net.0.weight"],
    "buffer": ["buffer net.1.running_var"],
    # A NaN moment reaches its weight before anything shows.
    "moment": ["optimizer state exp_avg_sq of net.0.weight", "parameter net.0.weight"],
}


# Under manual optimization no update is made again.
BACK = {way: ("restore",) if way == "manual" else ("restore", "redo") for way in WAYS}

# The module trained by hand has no buffer.
WHERE = [(way, kind) for way in WAYS for kind in PLACES if (way, kind) != ("manual", "buffer")]


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(("way", "kind"), WHERE)
def test_state_that_went_bad(way: str, kind: str, value: float, tmp_path: Path) -> None:
    """A weight, buffer or moment that turns non-finite by itself is named, the last good state comes back, and
    neither rate nor clipping is touched."""
    guard = NaNGuard(snapshot_every_n_steps=5)
    run = struck(way, FaultAt(kind, value, [batch_of(way, step) for step in (12, 30)]), guard, tmp_path)
    assert_sound(run, guard)
    assert words(guard) == [BACK[way]] * 2
    optimizers = 2 if way == "manual" else 1
    for found, step in zip(guard.interventions, (12, 30), strict=True):
        assert found.place in PLACES[kind]
        assert found.snapshot_step is not None
        assert found.snapshot_step <= optimizers * step
        # Found at the next reading, or when the next snapshot is certified at the latest.
        assert optimizers * step <= found.global_step <= optimizers * (step + 10)


def test_a_snapshot_of_the_bad_state_is_no_second_fault(tmp_path: Path) -> None:
    """A buffer goes bad just before the last snapshot of an epoch, which is then not certified yet. At the end of the
    epoch the guard makes the updates again, and the run ends with one record and the bits of a run without the fault.
    """
    fault, guard = FaultAt("buffer", NAN, STEPS - 2), NaNGuard(snapshot_every_n_steps=5)
    run = struck("automatic", fault, guard, tmp_path / "struck", max_epochs=2)
    assert [(one.global_step, one.remedies) for one in guard.interventions] == [(STEPS, ("restore", "redo"))]
    sound = fit(task("norm", adam), data_for("norm", STEPS), None, folder=tmp_path / "sound", max_epochs=2)
    assert differences(learner_of(sound.trainer, sound.module), learner_of(run.trainer, run.module)) == []


def test_a_huge_weight_is_named_and_not_the_statistics_behind_it(tmp_path: Path) -> None:
    """Batch norm hides a weight of 1e30 from the loss, and only its running variance overflows. The record says that
    the variance was seen, and the cause names the weight, to which the user's code may have written."""
    guard = NaNGuard(snapshot_every_n_steps=5)
    assert_sound(struck("automatic", FaultAt("weight", 1e30, 30, "net.0.weight"), guard, tmp_path), guard)
    [found] = guard.interventions
    assert found.finding is not None
    assert (found.place, found.finding.place) == ("buffer net.1.running_var", "parameter net.0.weight")
    assert "code that writes to parameter net.0.weight:" in found.finding.suggestion


@pytest.mark.parametrize(("way", "kind"), WHERE)
def test_state_that_is_huge_but_finite(way: str, kind: str, tmp_path: Path) -> None:
    """1e30 in a weight is seen in the loss and rolled back; in a buffer or moment it hides from training and may stay,
    but nothing turns non-finite and the rate is never cut."""
    guard = NaNGuard(snapshot_every_n_steps=5)
    fault = FaultAt(kind, 1e30, batch_of(way, 30), "net.2.weight" if way == "manual" else "net.3.weight")
    if kind == "buffer":
        fault.name = None
    run = struck(way, fault, guard, tmp_path)
    assert non_finite(learner_of(run.trainer, run.module)) == []
    assert guard.lr_multiplier == 1.0
    if kind == "weight":
        assert set(words(guard)) == {BACK[way]}
        largest = max(float(p.detach().abs().max()) for p in run.module.parameters())
        assert largest < 100


def test_a_running_variance_below_zero(tmp_path: Path) -> None:
    """No average of squares is negative, so the last good state comes back, though training does not use the number."""
    guard = NaNGuard(snapshot_every_n_steps=5)
    run = struck("automatic", FaultAt("buffer", -50.0, 30), guard, tmp_path)
    assert words(guard) == [("restore", "redo")]
    assert guard.interventions[0].place == "the root of buffer net.1.running_var"
    assert float(run.module.net[1].running_var.min()) >= 0


@pytest.mark.parametrize(("every", "last"), [(5, 140), (100, 160)], ids=["snapshot", "end"])
@pytest.mark.parametrize("kind", ["weight", "moment"])
def test_flipped_state_that_training_does_not_show(kind: str, every: int, last: int, tmp_path: Path) -> None:
    """A weight in front of a normalisation, or a moment, that a flipped bit made 1e8 is found when the next snapshot is
    looked at, or where none falls due at the end, by name, and the last good state comes back; its squares are still
    finite."""
    # Second moments of healthy runs grow as much: those are put back where evidence is asked for.
    act_on = "certain" if kind == "weight" else "evidence"
    guard = NaNGuard(snapshot_every_n_steps=every, act_on=act_on)
    fault = FaultAt(kind, 1e8, 130, "net.0.weight")
    data = data_for("norm", 160)
    run = fit(task("norm", adam), data, guard, folder=tmp_path, callbacks=[fault])
    assert fault.hits == 1
    assert words(guard) == [("restore", "redo")]
    found = guard.interventions[0]
    assert (found.fault, found.cause, found.place) == ("implausible_state", "corrupted_state", PLACES[kind][0])
    assert 130 <= found.global_step <= last
    [optimizer] = run.trainer.optimizers
    tensors = [*run.module.parameters(), *(value for state in optimizer.state.values() for value in state.values())]
    assert max(float(tensor.detach().abs().max()) for tensor in tensors) < 1e3


class Enlarges(Callback):
    """Makes every weight of the first layer many times as large, between two batches."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 40:
            with torch.no_grad():
                pl_module.net[0].weight.mul_(1e5)


@pytest.mark.parametrize("readback", ["step", "deferred"])
def test_saturated_weights_early_on(readback: str, tmp_path: Path) -> None:
    """A matrix that became 100,000 times as large among the first hundred updates, behind units that saturate, does not
    show in the loss; it goes back with the next snapshot, since the newest batches fare worse under it. The updates
    made again gave a good matrix at the same rate, so the rate is not blamed, though the matrix grew as a whole."""
    guard = NaNGuard(snapshot_every_n_steps=5, readback=readback, act_on="evidence")
    run = fit(task("mlp", adam), data_for("mlp", 80), guard, folder=tmp_path, callbacks=[Enlarges()])
    [found] = guard.interventions
    assert (found.fault, found.place, found.remedies) == (
        "implausible_state",
        "parameter net.0.weight",
        ("restore", "redo"),
    )
    assert found.finding is not None
    assert (found.cause, found.finding.evidence["times"]) == ("corrupted_state", 1.0)
    assert "so no batch and no rate caused it. Look for code that writes to it" in found.finding.suggestion
    assert 41 <= found.global_step <= 52
    assert float(run.module.net[0].weight.detach().abs().max()) < 100


def test_weights_that_have_far_to_go(tmp_path: Path) -> None:
    """Targets of 100,000 take the weights thousands of times as far from the start as they were, and that is learning:
    nothing is done, to the bit."""
    data = [(x, 1e5 * (y + 1)) for x, y in data_for("mlp", 60)]
    runs = []
    for guard in (None, NaNGuard(snapshot_every_n_steps=5, act_on="evidence")):
        torch.manual_seed(0)
        module = Task(nn.Linear(6, 2), lambda p: optim.SGD(p, lr=0.05))
        runs.append(fit(module, data, guard, folder=tmp_path))
    assert guard is not None
    assert guard.interventions == []
    assert differences(state_of(runs[0]), state_of(runs[1])) == []
    assert float(runs[1].module.net.bias.detach().abs().max()) > 1e4


def test_a_start_that_was_corrupt_twice(tmp_path: Path) -> None:
    """Where the first batches are corrupt, and those behind the rollback are too, such losses are not taken for the
    run's own: it goes back again, though the same weight has gone far before and half of the newest batches are bad."""
    guard = NaNGuard(snapshot_every_n_steps=8, act_on="evidence")
    fault = FaultAt("target", 1e15, [0, 1, 10, 11, 16, 17])
    module = task("mlp", lambda p: optim.SGD(p, lr=0.01))
    run = fit(module, data_for("mlp", 60), guard, folder=tmp_path, callbacks=[fault])
    assert [found.remedies for found in guard.interventions if found.fault == "implausible_state"] == [("restore",)] * 2
    assert max(float(p.detach().abs().max()) for p in run.module.parameters()) < 10


@pytest.mark.parametrize("kind", ["weight", "moment"])
def test_state_that_was_bad_in_the_first_step(kind: str, tmp_path: Path) -> None:
    """A fault right after the first update goes back to the start of fit, which its first loss certified."""
    guard = NaNGuard(snapshot_every_n_steps=5)
    run = struck("automatic", FaultAt(kind, NAN, 1), guard, tmp_path)
    assert_sound(run, guard)
    assert words(guard) == [("restore", "redo")]
    assert guard.interventions[0].snapshot_step == 0


@pytest.mark.parametrize("optimizer", [adam, lambda p: optim.SGD(p, lr=0.01, momentum=0.9)], ids=["adam", "momentum"])
@pytest.mark.parametrize("way", ["automatic", "accumulation"])
def test_restored_state_is_that_of_the_snapshot(
    way: str, optimizer: Callable[[list[nn.Parameter]], Optimizer], tmp_path: Path
) -> None:
    """After a rollback weights, buffers and moments are bit by bit those of the step it went back to."""
    window = WAYS[way].get("accumulate_grad_batches", 1)
    states, guard = States(), NaNGuard(thresholds=ONCE, snapshot_every_n_steps=5)
    fault = FaultAt("weight", NAN, 30 * window)
    data = data_for("norm", STEPS * window)
    fit(task("norm", optimizer), data, guard, folder=tmp_path, callbacks=[states, fault], **WAYS[way])
    found = guard.interventions[0]
    assert words(guard) == [("restore",)]
    assert found.snapshot_step is not None
    assert found.snapshot_step >= 20
    assert differences(states.after[found.global_step], states.after[found.snapshot_step]) == []


def test_restore_is_repeatable_from_one_snapshot(tmp_path: Path) -> None:
    """Going back twice to the same snapshot gives the same bits each time: training on did not change it."""
    states, guard = States(), NaNGuard(thresholds=ONCE, snapshot_every_n_steps=15)
    fault = FaultAt("weight", NAN, [24, 27])
    fit(task("norm", adam), data_for("norm", STEPS), guard, folder=tmp_path, callbacks=[states, fault])
    assert words(guard) == [("restore",)] * 2
    (went_to,) = {found.snapshot_step for found in guard.interventions}
    assert went_to is not None
    assert went_to > 0
    for found in guard.interventions:
        assert differences(states.after[found.global_step], states.after[went_to]) == []


def test_rollback_rewinds_the_learner_and_not_the_clock(tmp_path: Path) -> None:
    """``global_step``, the schedule and the random streams go on over a rollback, and new data follows."""
    seen: list[int] = []

    class Watches(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch_idx)

    rates = []
    for guard in (None, NaNGuard(snapshot_every_n_steps=5)):
        faults = [FaultAt("weight", NAN, 20), Watches()] if guard is not None else []
        module = task("mlp", adam, lambda o: optim.lr_scheduler.OneCycleLR(o, 0.02, total_steps=50))
        run = fit(module, data_for("mlp", STEPS), guard, folder=tmp_path, callbacks=faults)
        assert run.trainer.global_step == STEPS
        rates.append([run.trainer.optimizers[0].param_groups[0]["lr"], run.random["torch"].sum().item()])
    assert rates[0] == rates[1]
    assert seen == list(range(STEPS))


@pytest.mark.parametrize("act_on", ["certain", "evidence"])
def test_a_row_that_makes_statistics_infinite_costs_one_rollback(act_on: Any, tmp_path: Path) -> None:
    """The loss stays finite, for batch norm divides by what it has made of the row; later such batches are skipped."""
    data = batches(count=24)
    data[5][0][3] *= 1e30
    torch.manual_seed(0)
    guard = NaNGuard(act_on=act_on)
    run = fit(Task(mlp(norm=True)), data, guard, folder=tmp_path, max_epochs=4)
    assert words(guard) == [("restore",), ("skip",), ("skip",), ("skip",)]
    assert {one.fault for one in guard.interventions} == {"corrupted_state", "implausible_statistics"}
    assert all(bool(buffer.isfinite().all()) for buffer in run.module.buffers())
    assert guard.lr_multiplier == 1.0


def test_weights_that_make_statistics_huge_are_slowed(tmp_path: Path) -> None:
    """At a thousand times a good rate each batch makes the running statistics huge. The batches are not to blame, and
    none is skipped: the rate is cut, and the model learns."""
    rows = torch.Generator().manual_seed(3)
    classes = torch.randint(0, 4, (128,), generator=rows)
    inputs = torch.randn(128, 8, generator=rows) + 2 * nn.functional.one_hot(classes, 8)
    sizes = [8, 16, 16, 16, 16]
    torch.manual_seed(0)
    layers = [[nn.Linear(n, m, bias=False), nn.BatchNorm1d(m), nn.ReLU()] for n, m in pairwise(sizes)]
    net = nn.Sequential(*(layer for block in layers for layer in block), nn.Linear(16, 4))

    class Classifier(Task):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    guard = NaNGuard(snapshot_every_n_steps=8)
    module = Classifier(net, optimizer=lambda parameters: optim.SGD(parameters, 1000.0, momentum=0.9))
    fit(module, list(zip(inputs.split(8), classes.split(8), strict=True)), guard, folder=tmp_path, max_epochs=8)
    assert "skip" not in {word for one in words(guard) for word in one}
    assert ("implausible_statistics", ("restore", "scale")) in [
        (one.fault, one.remedies) for one in guard.interventions
    ]
    with torch.no_grad():
        assert nn.functional.cross_entropy(module.eval().net(inputs), classes) < 0.7


def test_steps_of_several_evaluations_are_counted_once(tmp_path: Path) -> None:
    """LBFGS computes the gradient several times for one step. What a rollback undid is counted in steps."""
    guard = NaNGuard(snapshot_every_n_steps=4, dirpath=tmp_path)
    lbfgs = partial(optim.LBFGS, lr=0.1, max_iter=3)
    fit(Task(mlp(), lbfgs), batches(count=20), guard, folder=tmp_path, callbacks=[FaultAt("weight", NAN, 9)])
    (found,) = guard.interventions
    assert found.snapshot_step is not None
    assert 0 < found.updates_lost == found.global_step - found.snapshot_step


@pytest.mark.parametrize("max_iter", [1, 6])
def test_shares_of_skipped_updates_with_several_evaluations(max_iter: int, tmp_path: Path) -> None:
    """The budget and the advice count each step of LBFGS once, however often it evaluates its closure."""
    data = [with_nan(batch) if index % 2 else batch for index, batch in enumerate(batches(count=60))]
    guard = NaNGuard(budget=Budget(max_skip_share=0.3), dirpath=tmp_path)
    lbfgs = partial(optim.LBFGS, lr=0.05, max_iter=max_iter, tolerance_change=0.0)
    with pytest.raises(TrainingDivergedError, match=r"33 of the last 67 updates were bad"):
        fit(Task(mlp(), lbfgs), data, guard, folder=tmp_path, max_epochs=2)
    assert guard.interventions[-1].global_step == 66
    advice = next(one for one in guard.advice if one.finding.cause == "many_skipped_batches")
    assert advice.finding.evidence["updates"] == advice.global_step
