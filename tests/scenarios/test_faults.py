"""One fault of every kind, in every way to train: the run goes on, finite, with the record that fits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule
from torch import nn, optim
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_nanguard import (
    Budget,
    ClipGradients,
    NaNGuard,
    NonFinite,
    ReduceLR,
    ResetMoments,
    Rollback,
    SkipStep,
    StopTraining,
    TrainingDivergedError,
)
from lightning_nanguard.trainer.batch_replay import TrainerBatchReplay
from tests.helpers import (
    FaultAt,
    Run,
    States,
    Task,
    data_for,
    differences,
    fit,
    learner_of,
    non_finite,
    samples,
    state_of,
    task,
    with_nan,
    words,
)
from tests.scenarios.test_skips import left_behind

NAN, INF = math.nan, math.inf
STEPS = 40

# How the same 40 updates are made.
WAYS: dict[str, dict[str, Any]] = {
    "automatic": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "manual": {},
}


def adam(parameters: list[nn.Parameter]) -> Optimizer:
    return optim.Adam(parameters, lr=0.01)


def struck(way: str, fault: FaultAt, guard: NaNGuard, folder: Path, *more: Callback, **options: Any) -> Run:
    """A run of 40 updates that meets a fault."""
    model = "manual" if way == "manual" else "norm"
    window = WAYS[way].get("accumulate_grad_batches", 1)
    data = data_for(model, STEPS * window)
    run = fit(task(model, adam), data, guard, folder=folder, callbacks=[fault, *more], **WAYS[way], **options)
    assert fault.hits >= 1, "the fault was never put in"
    return run


def batch_of(way: str, step: int) -> int:
    return step * WAYS[way].get("accumulate_grad_batches", 1)


def assert_sound(run: Run, guard: NaNGuard) -> None:
    """All that is learned is finite, it learned, and the rate was left alone."""
    assert non_finite(learner_of(run.trainer, run.module)) == []
    assert guard.lr_multiplier == 1.0
    assert guard.clip_val is None
    losses = [row[key] for _, row in run.logger.rows for key in row if key in ("loss_step", "loss_1_step")]
    assert losses[-1] < losses[0]
    for found in guard.interventions:
        assert found.lr_before == found.lr_after == 0.01
        assert found.applied
        assert found.message
        json.dumps(found.to_dict(), allow_nan=False)


# ---------------------------------------------------------------------------------------------------- one bad batch


@pytest.mark.parametrize("step", [0, 12, 30])
@pytest.mark.parametrize("value", [NAN, INF, 1e30])
@pytest.mark.parametrize("kind", ["loss", "gradient", "input", "target"])
@pytest.mark.parametrize("way", WAYS)
def test_bad_batch(way: str, kind: str, value: float, step: int, tmp_path: Path) -> None:
    """A bad loss, gradient, sample or target costs its batch and nothing else: one skip, no rollback, no cut."""
    guard = NaNGuard(snapshot_every_n_steps=5)
    at = batch_of(way, step)
    run = struck(way, FaultAt(kind, value, at), guard, tmp_path)
    assert_sound(run, guard)
    if kind == "input" and value == 1e30:
        # Batch norm and tanh make of it a finite loss and a harmless gradient; at most its statistics overflow.
        assert words(guard) == ([] if way == "manual" else [("restore",)])
        return
    assert set(words(guard)) == {("skip",)}
    # Both optimizers of manual optimization may name the same batch.
    assert len(guard.interventions) <= (2 if way == "manual" else 1)
    for found in guard.interventions:
        assert at <= found.batch_idx < at + batch_of(way, 1)
        assert found.snapshot_step is None
        assert found.fault in ("non_finite_loss", "non_finite_gradient", "gradient_overflow", "gradient_spike")
    first = guard.interventions[0]
    if kind == "gradient" and not math.isfinite(value):
        assert (first.fault, first.place) == ("non_finite_gradient", "gradient of net.0.weight")
    elif not math.isfinite(value):
        assert (first.fault, first.place) == ("non_finite_loss", "loss")
    if kind in ("input", "target") and not math.isfinite(value) and way != "accumulation":
        assert first.cause == "non_finite_input"


@pytest.mark.parametrize("step", [0, 12, 30])
@pytest.mark.parametrize("value", [NAN, INF, 1e30])
def test_loss_that_is_bad_only_once(value: float, step: int, tmp_path: Path) -> None:
    """A loss that is bad at its first look and fine at the second costs its batch, and not the learning rate."""
    guard = NaNGuard(snapshot_every_n_steps=5)
    run = struck("automatic", FaultAt("flash", value, step), guard, tmp_path)
    assert_sound(run, guard)
    assert len(guard.interventions) == 1
    assert words(guard)[0] in [("skip",), ("restore",)]


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
    assert words(guard) == [("skip",), ("restore",)] * 6


# ---------------------------------------------------------------------------------------------------- state gone bad


PLACES = {
    "weight": ["parameter net.0.weight"],
    "buffer": ["buffer net.1.running_var"],
    # A NaN moment reaches its weight before anything shows.
    "moment": ["optimizer state exp_avg_sq of net.0.weight", "parameter net.0.weight"],
}


@pytest.mark.parametrize("step", [12, 30])
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("kind", ["weight", "buffer", "moment"])
@pytest.mark.parametrize("way", WAYS)
def test_state_that_went_bad(way: str, kind: str, value: float, step: int, tmp_path: Path) -> None:
    """A weight, buffer or moment that turns non-finite by itself is named, the last good state comes back, and
    neither rate nor clipping is touched."""
    if way == "manual" and kind == "buffer":
        pytest.skip("the module trained by hand has no buffer")
    guard = NaNGuard(snapshot_every_n_steps=5)
    states = States()
    run = struck(way, FaultAt(kind, value, batch_of(way, step)), guard, tmp_path, states)
    assert_sound(run, guard)
    assert words(guard) == [("restore",)]
    found = guard.interventions[0]
    assert found.place in PLACES[kind]
    assert found.snapshot_step is not None
    scale = 2 if way == "manual" else 1
    assert found.snapshot_step <= scale * step
    # Found at the next reading, or when the next snapshot is certified at the latest.
    assert scale * step <= found.global_step <= scale * (step + 10)


@pytest.mark.parametrize("kind", ["weight", "buffer", "moment"])
@pytest.mark.parametrize("way", WAYS)
def test_state_that_is_huge_but_finite(way: str, kind: str, tmp_path: Path) -> None:
    """1e30 in a weight is seen in the loss and rolled back; in a buffer or moment it hides from training and may stay,
    but nothing turns non-finite and the rate is never cut."""
    if way == "manual" and kind == "buffer":
        pytest.skip("the module trained by hand has no buffer")
    guard = NaNGuard(snapshot_every_n_steps=5)
    fault = FaultAt(kind, 1e30, batch_of(way, 30), "net.2.weight" if way == "manual" else "net.3.weight")
    if kind == "buffer":
        fault.name = None
    run = struck(way, fault, guard, tmp_path)
    assert non_finite(learner_of(run.trainer, run.module)) == []
    assert guard.lr_multiplier == 1.0
    if kind == "weight":
        assert set(words(guard)) == {("restore",)}
        largest = max(float(p.detach().abs().max()) for p in run.module.parameters())
        assert largest < 100


@pytest.mark.parametrize(("every", "last"), [(5, 140), (100, 160)], ids=["snapshot", "end"])
@pytest.mark.parametrize("kind", ["weight", "moment"])
def test_flipped_state_that_training_does_not_show(kind: str, every: int, last: int, tmp_path: Path) -> None:
    """A weight in front of a normalisation, or a moment, that a flipped bit made 1e8 is found when the next snapshot is
    looked at, or where none falls due at the end, by name, and the last good state comes back; its squares are still
    finite."""
    guard = NaNGuard(snapshot_every_n_steps=every)
    fault = FaultAt(kind, 1e8, 130, "net.0.weight")
    data = data_for("norm", 160)
    run = fit(task("norm", adam), data, guard, folder=tmp_path, callbacks=[fault])
    assert fault.hits == 1
    assert words(guard) == [("restore",)]
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
    show in the loss; it goes back with the next snapshot, since the newest batches fare worse under it."""
    guard = NaNGuard(snapshot_every_n_steps=5, readback=readback)
    run = fit(task("mlp", adam), data_for("mlp", 80), guard, folder=tmp_path, callbacks=[Enlarges()])
    [found] = guard.interventions
    assert (found.fault, found.place, found.remedies) == ("implausible_state", "parameter net.0.weight", ("restore",))
    assert 41 <= found.global_step <= 52
    assert float(run.module.net[0].weight.detach().abs().max()) < 100


def test_weights_that_have_far_to_go(tmp_path: Path) -> None:
    """Targets of 100,000 take the weights thousands of times as far from the start as they were, and that is learning:
    nothing is done, to the bit."""
    data = [(x, 1e5 * (y + 1)) for x, y in data_for("mlp", 60)]
    runs = []
    for guard in (None, NaNGuard(snapshot_every_n_steps=5)):
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
    guard = NaNGuard(snapshot_every_n_steps=8)
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
    assert words(guard) == [("restore",)]
    assert guard.interventions[0].snapshot_step == 0


@pytest.mark.parametrize("optimizer", [adam, lambda p: optim.SGD(p, lr=0.01, momentum=0.9)], ids=["adam", "momentum"])
@pytest.mark.parametrize("way", ["automatic", "accumulation"])
def test_restored_state_is_that_of_the_snapshot(
    way: str, optimizer: Callable[[list[nn.Parameter]], Optimizer], tmp_path: Path
) -> None:
    """After a rollback weights, buffers and moments are bit by bit those of the step it went back to."""
    window = WAYS[way].get("accumulate_grad_batches", 1)
    states, guard = States(), NaNGuard(snapshot_every_n_steps=5)
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
    states, guard = States(), NaNGuard(snapshot_every_n_steps=15)
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


class SpoilsBeforeValidation(Callback):
    """Poisons batch norm's statistics in the last batch before a validation: training does not look at them."""

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            with torch.no_grad():
                pl_module.net[1].running_var[0] = NAN


def test_bad_validation_loss_under_healthy_training(tmp_path: Path) -> None:
    """A validation loss that is not finite while training is leads to the poisoned buffer, which is put back."""
    guard = NaNGuard(snapshot_every_n_steps=5)
    run = fit(
        task("norm", adam),
        data_for("norm", 20),
        guard,
        folder=tmp_path,
        val=data_for("norm", 2, seed=5),
        max_epochs=3,
        callbacks=[SpoilsBeforeValidation()],
    )
    assert_sound(run, guard)
    (found,) = guard.interventions
    assert (found.fault, found.place) == ("non_finite_validation", "buffer net.1.running_var")
    assert found.remedies == ("restore",)
    assert (found.epoch, found.batch_idx) == (1, -1)
    assert math.isfinite(float(run.trainer.callback_metrics["val_loss"]))


def test_restore_in_validation_keeps_the_epochs_means(tmp_path: Path) -> None:
    """The training batches before a bad validation were healthy: the epoch's mean still counts them all."""
    means = []
    for guard in (None, NaNGuard(snapshot_every_n_steps=5)):
        callbacks = [SpoilsBeforeValidation()] if guard is not None else []
        options = {"val": data_for("norm", 2, seed=5), "max_epochs": 2, "folder": tmp_path, "callbacks": callbacks}
        run = fit(task("norm", adam), data_for("norm", 20), guard, **options)
        means.append(float(run.trainer.callback_metrics["loss_epoch"]))
        if guard is not None:
            assert words(guard) == [("restore",)]
    assert means[0] == means[1]


def test_validation_data_that_is_bad_is_no_fault_of_the_state(tmp_path: Path) -> None:
    """A corrupt validation sample gives a non-finite validation loss at every epoch; the run is not rolled back for it
    until the budget is gone, nor is its rate cut."""
    guard = NaNGuard(snapshot_every_n_steps=5)
    val = [with_nan(batch) for batch in data_for("norm", 2, seed=5)]
    run = fit(task("norm", adam), data_for("norm", 5), guard, folder=tmp_path, val=val, max_epochs=30)
    assert run.trainer.global_step == 150
    assert guard.lr_multiplier == 1.0
    losses = [row["loss_epoch"] for _, row in run.logger.rows if "loss_epoch" in row]
    assert losses[-1] < 0.5 * losses[0], "the rollbacks kept it from learning"


# ---------------------------------------------------------------------------------------------------- it ends


def test_no_step_was_ever_good(tmp_path: Path) -> None:
    """A run whose every loss is NaN from the first ends within a bounded number of steps, not at the last epoch."""
    guard = NaNGuard()
    module = task("mlp", adam)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    fault = FaultAt("loss", NAN, range(10_000))
    with pytest.raises(TrainingDivergedError, match=r"(?s)no update was ever good.*the loss is nan"):
        fit(module, data_for("mlp", 20), guard, folder=tmp_path, max_epochs=100, callbacks=[fault])
    assert len(guard.interventions) <= 40
    assert guard.interventions[-1].remedies == ("stop",)
    assert differences(dict(module.named_parameters()), before) == []


def test_every_batch_is_corrupt(tmp_path: Path) -> None:
    """Data that is NaN from the first batch on ends the run, names the input as the cause, and leaves the weights."""
    guard = NaNGuard()
    module = task("norm", adam)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    data = [with_nan(batch) for batch in data_for("norm", 20)]
    with pytest.raises(TrainingDivergedError, match=r"(?s)updates? in a row were bad|no update was ever good"):
        fit(module, data, guard, folder=tmp_path, max_epochs=100)
    assert len(guard.interventions) <= 64
    assert guard.interventions[-1].cause == "non_finite_input"
    assert differences(dict(module.named_parameters()), before) == []
    assert non_finite(dict(module.named_buffers())) == []


@pytest.mark.parametrize("kind", ["loss", "gradient", "input", "weight", "moment"])
def test_every_step_is_bad_from_some_step_on(kind: str, tmp_path: Path) -> None:
    """Whatever goes bad for good in mid-run, the run ends within a bounded number of steps with finite weights, and
    the error says fault, place, what was tried and where the good state is."""
    guard = NaNGuard(snapshot_every_n_steps=5)
    module = task("norm", adam)
    fault = FaultAt(kind, NAN, range(30, 100_000))
    with pytest.raises(TrainingDivergedError, match=r"(?s)Training cannot go on: .*Tried before: .*weights of step"):
        fit(module, data_for("norm", 20), guard, folder=tmp_path, max_epochs=100, callbacks=[fault])
    assert non_finite([dict(module.named_parameters()), dict(module.named_buffers())]) == []
    assert len(guard.interventions) < 150
    last = guard.interventions[-1]
    assert last.remedies == ("stop",)
    assert last.global_step < 30 + 300


@pytest.mark.parametrize("name", ["net.0.weight", "net.3.bias"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_weights_that_are_bad_from_the_start(name: str, value: float, tmp_path: Path) -> None:
    """Non-finite initial weights end the run before the first step, with the parameter's name and what to do."""
    module = task("norm", adam)
    with torch.no_grad():
        dict(module.named_parameters())[name].view(-1)[-1] = value
    with pytest.raises(TrainingDivergedError, match=rf"parameter {name} holds NaN or Inf before the first update"):
        fit(module, data_for("norm"), NaNGuard(), folder=tmp_path)


def test_budget_for_rollbacks(tmp_path: Path) -> None:
    """The rollback after the last allowed one is a stop, and the module holds the last good weights."""
    states = States()
    guard = NaNGuard(snapshot_every_n_steps=5, budget=Budget(max_rollbacks=2))
    fault = FaultAt("weight", NAN, [12, 18, 24, 30])
    module = task("mlp", adam)
    with pytest.raises(TrainingDivergedError, match=r"(?s)budget is used up: 2 rollbacks within 1000 updates") as error:
        fit(module, data_for("mlp", STEPS), guard, folder=tmp_path, callbacks=[states, fault])
    assert words(guard) == [("restore",), ("restore",), ("stop",)]
    assert error.value.snapshot_step == guard.interventions[-1].snapshot_step
    assert error.value.snapshot_step is not None
    good = states.after[error.value.snapshot_step]["parameters"]
    assert differences(dict(module.named_parameters()), good) == []


def test_budget_for_one_place(tmp_path: Path) -> None:
    """One place has a smaller budget than all together."""
    guard = NaNGuard(snapshot_every_n_steps=5, budget=Budget(max_rollbacks=20, max_rollbacks_per_place=1))
    faults = [FaultAt("weight", NAN, [12, 24]), FaultAt("buffer", NAN, 6)]
    with pytest.raises(TrainingDivergedError, match=r"(?s)budget is used up: 2 rollbacks .*, 1 of them for this"):
        fit(task("norm", adam), data_for("norm", STEPS), guard, folder=tmp_path, callbacks=faults)
    assert words(guard) == [("restore",), ("restore",), ("stop",)]


def test_budget_for_bad_batches_in_a_row(tmp_path: Path) -> None:
    """One bad batch more in a row than allowed is a stop."""
    guard = NaNGuard(snapshot_every_n_steps=5, budget=Budget(max_bad_batches=3))
    fault = FaultAt("input", NAN, [10, 11, 12, 20, 21, 22, 23])
    with pytest.raises(TrainingDivergedError, match=r"4 updates in a row were bad"):
        fit(task("mlp", adam), data_for("mlp", STEPS), guard, folder=tmp_path, callbacks=[fault])
    assert words(guard) == [("skip",)] * 6 + [("stop",)]


def test_budget_for_the_share_of_bad_batches(tmp_path: Path) -> None:
    """Every second batch bad is within no default, even though never two come in a row."""
    guard = NaNGuard(snapshot_every_n_steps=5, budget=Budget(max_bad_batches=4, max_skip_share=0.3, window=50))
    fault = FaultAt("input", NAN, range(11, 1000, 2))
    with pytest.raises(TrainingDivergedError, match=r"of the last \d+ updates were bad"):
        fit(task("mlp", adam), data_for("mlp", 100), guard, folder=tmp_path, callbacks=[fault])
    assert len(guard.interventions) < 30


# ---------------------------------------------------------------------------------------------------- the user's choice


@pytest.mark.parametrize("remedies", [[], [SkipStep()], [StopTraining()]], ids=["none", "skip", "stop"])
def test_bad_batch_is_skipped_whatever_remedies_are_listed(remedies: list[Any], tmp_path: Path) -> None:
    """Remedies are for what a skip cannot help: a bad batch is skipped without any of them."""
    guard = NaNGuard(remedies=remedies, snapshot_every_n_steps=5)
    run = struck("automatic", FaultAt("input", NAN, 12), guard, tmp_path)
    assert_sound(run, guard)
    assert words(guard) == [("skip",)]


@pytest.mark.parametrize("remedies", [[], [SkipStep()], [StopTraining()]], ids=["none", "skip", "stop"])
def test_lost_state_stops_where_no_remedy_may_bring_it_back(remedies: list[Any], tmp_path: Path) -> None:
    """Without a remedy that helps, a lost learner ends the run at once, with the last good weights in place."""
    states, guard = States(), NaNGuard(remedies=remedies, snapshot_every_n_steps=5)
    module = task("mlp", adam)
    with pytest.raises(TrainingDivergedError, match=r"parameter net\.0\.weight") as error:
        fit(
            module,
            data_for("mlp", STEPS),
            guard,
            folder=tmp_path,
            callbacks=[states, FaultAt("weight", NAN, 17)],
        )
    assert words(guard) == [("stop",)]
    assert error.value.snapshot_step is not None
    good = states.after[error.value.snapshot_step]["parameters"]
    assert differences(dict(module.named_parameters()), good) == []


@pytest.mark.parametrize(
    "remedies",
    [
        [Rollback()],
        [ReduceLR(), Rollback()],
        [ClipGradients(), Rollback(), StopTraining()],
        [ResetMoments(), Rollback()],
    ],
    ids=["rollback", "rate first", "clip first", "moments first"],
)
def test_lost_state_is_restored_and_nothing_else(remedies: list[Any], tmp_path: Path) -> None:
    """State that went bad by itself is rolled back only, in whatever order the remedies stand."""
    guard = NaNGuard(remedies=remedies, snapshot_every_n_steps=5)
    run = struck("automatic", FaultAt("weight", NAN, 17), guard, tmp_path)
    assert_sound(run, guard)
    assert words(guard) == [("restore",)]


def test_without_detectors_nothing_is_found_but_in_the_state(tmp_path: Path) -> None:
    """``detectors=[]`` leaves a bad loss alone; a snapshot is still never certified with a bad weight in it."""
    guard = NaNGuard(detectors=[], snapshot_every_n_steps=5)
    run = struck("automatic", FaultAt("loss", NAN, 12), guard, tmp_path)
    assert {found.fault for found in guard.interventions} <= {"corrupted_state"}
    assert non_finite(learner_of(run.trainer, run.module)) == []


@pytest.mark.parametrize("kind", ["input", "loss", "gradient", "weight", "buffer", "moment"])
@pytest.mark.parametrize("way", WAYS)
def test_observing_changes_nothing(way: str, kind: str, tmp_path: Path) -> None:
    """With ``observe=True`` the run is the bare one bit by bit, also when it goes NaN for good; what would have been
    done is on record and marked as not applied."""
    if way == "manual" and kind == "buffer":
        pytest.skip("the module trained by hand has no buffer")
    model = "manual" if way == "manual" else "norm"
    data = data_for(model, 30)
    guard = NaNGuard(observe=True, snapshot_every_n_steps=3)
    ended = []
    for watching in (None, guard):
        fault = FaultAt(kind, NAN, 12)
        run = fit(task(model, adam), data, watching, folder=tmp_path, callbacks=[fault], **WAYS[way])
        state = state_of(run)
        state["logged"] = [
            (step, {key: value for key, value in row.items() if not key.startswith("nanguard")})
            for step, row in state["logged"]
            if not any(key.startswith("nanguard") for key in row)
        ]
        for metrics in ("callback_metrics", "logged_metrics", "progress_bar_metrics"):
            state[metrics].pop("nanguard", None)
        ended.append(state)
    assert differences(*ended) == []
    assert guard.interventions
    assert not any(found.applied for found in guard.interventions)
    expected = {"input": ("skip",), "loss": ("skip",), "gradient": ("skip",)}.get(kind, ("restore",))
    assert guard.interventions[0].remedies == expected


def test_callable_is_told_before_the_next_step(tmp_path: Path) -> None:
    """``on_intervention`` and the file have a record before the next batch begins."""
    told: list[tuple[int, int]] = []
    lines: list[int] = []
    path = tmp_path / "records" / "interventions.jsonl"

    class Looks(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, *args: Any) -> None:
            lines.append(len(path.read_text().splitlines()) if path.exists() else 0)

    guard = NaNGuard(
        [NonFinite()], dirpath=path.parent, on_intervention=lambda i: told.append((i.batch_idx, len(lines)))
    )
    faults = [FaultAt("input", NAN, [3, 9])]
    fit(task("mlp", adam), data_for("mlp", 12), guard, folder=tmp_path, callbacks=[*faults, Looks()])
    assert told == [(3, 4), (9, 10)]
    assert lines == [0] * 4 + [1] * 6 + [2] * 2


@pytest.mark.parametrize("model", ["mlp", "manual"])
def test_a_finite_fault_in_the_first_batch(model: str, tmp_path: Path) -> None:
    """Nothing came before that the first batch could be told by: the third tells it, and the run starts anew behind it,
    as if the three had never been. When it comes back it is skipped."""
    data = data_for(model, 40)
    bad = (data[0][0], data[0][1] * 1e15)
    guard = NaNGuard(snapshot_every_n_steps=5)
    guarded = fit(task(model, adam), [bad, *data[1:20], bad, *data[20:]], guard, folder=tmp_path)
    assert words(guard)[0] == ("restore",)
    assert set(words(guard)[1:]) == {("skip",)}
    assert guard.lr_multiplier == 1.0
    if model == "mlp":
        never = fit(task(model, adam), data[3:], folder=tmp_path)
        one, other = left_behind(guarded), left_behind(never)
        for part in ("parameters", "optimizers"):
            assert differences(one[part], other[part]) == []


def test_a_batch_that_comes_back_is_not_compared_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is bad for the same reason in every epoch is looked into at first, then more and more rarely; each
    is skipped and on record all the same."""
    looks: list[int] = []
    probe = TrainerBatchReplay.probe

    def counted(self: TrainerBatchReplay) -> float | None:
        looks.append(1)
        return probe(self)

    monkeypatch.setattr(TrainerBatchReplay, "probe", counted)
    bad = list(range(10, 400, 10))
    guard = NaNGuard(snapshot_every_n_steps=5)
    fault = FaultAt("loss", NAN, bad)
    fit(task("norm", adam), data_for("norm", 400), guard, folder=tmp_path, callbacks=[fault])
    assert words(guard) == [("skip",)] * len(bad)
    assert len({(one.fault, one.cause) for one in guard.interventions}) == 1
    assert len(looks) == 2 * len([n for n in range(len(bad)) if n <= 4 or n & (n - 1) == 0])
