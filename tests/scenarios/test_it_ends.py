"""A run that cannot be helped ends within a bounded number of updates, with the cause and the last good state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_nanguard import (
    Budget,
    NaNGuard,
    Remedy,
    Rollback,
    TrainingDivergedError,
)
from tests.helpers import (
    FaultAt,
    States,
    data_for,
    differences,
    fit,
    non_finite,
    task,
    with_nan,
    words,
)
from tests.scenarios.struck import INF, NAN, STEPS, adam


def test_no_step_was_ever_good(tmp_path: Path) -> None:
    """A run whose every loss is NaN from the first ends within a bounded number of steps, not at the last epoch."""
    guard = NaNGuard()
    module = task("mlp", adam)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    fault = FaultAt("loss", NAN, range(10_000))
    with pytest.raises(TrainingDivergedError, match=r"(?s)no update was ever good.*the loss is nan"):
        fit(module, data_for("mlp", 20), guard, folder=tmp_path, max_epochs=100, callbacks=[fault])
    assert len(guard.interventions) == 64
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
    """Whatever goes bad for good in mid-run, the run ends within the window of the budget with finite weights, and
    the error says fault, place, what was tried and where the good state is."""
    guard = NaNGuard(snapshot_every_n_steps=5, budget=Budget(window=100))
    module = task("norm", adam)
    fault = FaultAt(kind, NAN, range(30, 100_000))
    with pytest.raises(TrainingDivergedError, match=r"(?s)Training cannot go on: .*tried before: .*weights of step"):
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


def test_an_observing_guard_does_not_end_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Weights that are bad from the start are named, and the run goes on as it does without the guard."""
    module = task("norm", adam)
    with torch.no_grad():
        next(module.parameters()).view(-1)[-1] = NAN
    with caplog.at_level("INFO", "lightning_nanguard"):
        done = fit(module, data_for("norm"), NaNGuard(observe=True), folder=tmp_path)
    assert done.trainer.global_step == len(data_for("norm"))
    assert "NaNGuard: parameter net.0.weight holds NaN or Inf before the first update" in caplog.text


def test_budget_for_rollbacks(tmp_path: Path) -> None:
    """The rollback after the last allowed one is a stop, and the module holds the last good weights."""
    states = States()
    guard = NaNGuard(snapshot_every_n_steps=5, budget=Budget(max_rollbacks=2))
    fault = FaultAt("weight", NAN, [12, 22, 32])
    module = task("mlp", adam)
    with pytest.raises(TrainingDivergedError, match=r"(?s)budget is used up: 2 rollbacks within 1000 updates") as error:
        fit(module, data_for("mlp", STEPS), guard, folder=tmp_path, callbacks=[states, fault])
    assert words(guard) == [("restore", "redo"), ("restore", "redo"), ("stop",)]
    assert error.value.snapshot_step == guard.interventions[-1].snapshot_step
    assert error.value.snapshot_step is not None
    good = states.after[error.value.snapshot_step]["parameters"]
    assert differences(dict(module.named_parameters()), good) == []


def test_budget_for_one_place(tmp_path: Path) -> None:
    """One place has a smaller budget than all together."""
    guard = NaNGuard(snapshot_every_n_steps=5, budget=Budget(max_rollbacks=20, max_rollbacks_per_place=1))
    faults = [FaultAt("weight", NAN, [12, 24]), FaultAt("buffer", NAN, 6)]
    with pytest.raises(TrainingDivergedError, match=r"(?s)budget is used up: 1 rollbacks .*, 1 of them for this"):
        fit(task("norm", adam), data_for("norm", STEPS), guard, folder=tmp_path, callbacks=faults)
    assert words(guard) == [("restore", "redo"), ("restore", "redo"), ("stop",)]


def test_budget_for_bad_batches_in_a_row(tmp_path: Path) -> None:
    """One bad batch more in a row than allowed is a stop."""
    guard = NaNGuard(snapshot_every_n_steps=5, budget=Budget(max_bad_batches=3))
    fault = FaultAt("input", NAN, [10, 11, 12, 20, 21, 22, 23])
    with pytest.raises(TrainingDivergedError, match=r"4 updates in a row were bad"):
        fit(task("mlp", adam), data_for("mlp", STEPS), guard, folder=tmp_path, callbacks=[fault])
    assert words(guard) == [("skip",)] * 6 + [("stop",)]


def test_budget_for_the_share_of_bad_batches(tmp_path: Path) -> None:
    """A user may bound the share of bad updates, even though never two come in a row; it counts once 32 were bad."""
    guard = NaNGuard(snapshot_every_n_steps=5, budget=Budget(max_bad_batches=4, max_skip_share=0.3, window=80))
    fault = FaultAt("input", NAN, range(11, 1000, 2))
    with pytest.raises(TrainingDivergedError, match=r"of the last \d+ updates were bad"):
        fit(task("mlp", adam), data_for("mlp", 120), guard, folder=tmp_path, callbacks=[fault])
    assert words(guard) == [("skip",)] * 32 + [("stop",)]


@pytest.mark.parametrize("corrects", [True, False])
def test_a_rollback_without_effect_is_not_made_a_third_time(corrects: bool, tmp_path: Path) -> None:
    """A weight that is bad again after each of two rollbacks, before a new state was proven good, is taken for the
    learner's doing; four corrected rollbacks later, or at once where no correction is listed, the run ends."""
    remedies: list[Remedy] | None = None if corrects else [Rollback()]
    guard = NaNGuard(remedies=remedies, snapshot_every_n_steps=5)
    fault = FaultAt("weight", NAN, range(12, 100))
    failed = 6 if corrects else 2
    with pytest.raises(TrainingDivergedError, match=f"the fault came back after each of {failed} rollbacks"):
        fit(task("mlp", adam), data_for("mlp", STEPS), guard, folder=tmp_path, callbacks=[fault])
    done = words(guard)
    assert done[:2] + done[-1:] == [("restore", "redo")] * 2 + [("stop",)]
    assert len(done) == failed + 1
    assert all({"clip", "scale"} & {*one} for one in done[2:-1])
