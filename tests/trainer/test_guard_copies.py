"""A guard is copied, pickled and forgotten like any other callback."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule
from torch import nn

from lightning_nanguard import Budget, DivergingLoss, Intervention, NaNGuard, NonFinite, ReduceLR, Rollback
from tests.helpers import FaultAt, Task, batches, differences, fit, state_of, task, trainer_for, with_bad

WAYS = {
    "deep copy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}


def loaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Copies(Callback):
    """Copies the guard in the middle of a fit."""

    def __init__(self, guard: NaNGuard, way: str) -> None:
        self.guard, self.way = guard, way
        self.copy: NaNGuard

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 12:
            self.copy = WAYS[self.way](self.guard)


@pytest.mark.parametrize(
    ("way", "when"), [("pickle", "during"), ("pickle", "after"), ("deep copy", "before"), ("deep copy", "during")]
)
def test_copies_guard_like_the_original(way: str, when: str, tmp_path: Path) -> None:
    """Made before, in the middle of and after a fit, a copy has the records and the state, and can be used."""
    guard = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=4, budget=Budget(max_rollbacks=7))
    during = Copies(guard, way)
    if when != "before":
        fit(task(), with_bad(5, 9), guard, callbacks=[during])
    made = during.copy if when == "during" else WAYS[way](guard)
    assert repr(made.interventions) == repr(guard.interventions)
    if when == "after":
        assert differences(made.state_dict(), guard.state_dict()) == []
    before = len(made.interventions)
    fit(task(), with_bad(7), made)
    assert [one.batch_idx for one in list(made.interventions)[before:]] == [7]


@pytest.mark.parametrize("way", ["deep copy", "copy"])
def test_the_records_of_copies_are_found_from_the_original(way: str, tmp_path: Path) -> None:
    """Packages copy a model with its callbacks and train the copy: its records, advice, folder and figures are on the
    user's guard."""
    told: list[Intervention] = []
    guard = NaNGuard(dirpath=tmp_path, on_intervention=told.append, preflight=True)
    made = WAYS[way](WAYS[way](guard))
    fit(task(), with_bad(0, 7), made)
    assert [one.batch_idx for one in guard.interventions] == [one.batch_idx for one in told] == [0, 7]
    assert guard.advice == made.advice
    assert guard.advice != ()
    assert (guard.run_id, guard.run_dir, guard.summary()) == (made.run_id, made.run_dir, made.summary())
    assert "NaNGuard: 24 updates" in guard.summary()
    assert guard.non_finite_rate == made.non_finite_rate == pytest.approx(2 / 24)
    other = WAYS[way](guard)
    fit(task(), with_bad(3), other)
    assert len(made.interventions) == 2


def test_a_guard_whose_copy_is_used_is_in_use(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is said of a guard that was never called when a copy of it was, or one in another process may be."""
    used, sent = NaNGuard(dirpath=tmp_path), NaNGuard(dirpath=tmp_path)
    made, read = copy.deepcopy(used), pickle.loads(pickle.dumps(sent))
    fit(task(), batches(count=2), made)
    del used, made, sent, read
    gc.collect()
    assert "no Trainer ever called it" not in caplog.text


def test_trainer_module_and_guard_are_pickled_after_a_fit(tmp_path: Path) -> None:
    """Nothing of the guard's stays on them that could not be."""
    guard = NaNGuard(dirpath=tmp_path, last_good_every_n_steps=4, bundle_dir=tmp_path / "incidents")
    run = fit(Plain(), with_bad(5), guard)
    for way in WAYS.values():
        trainer, module, made = way((run.trainer, run.module, guard))
        assert trainer.global_step == run.trainer.global_step
        assert differences(module.state_dict(), run.module.state_dict()) == []
        assert len(made.interventions) == 1


class Plain(Task):
    """A task without lambdas."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)))
        del self.make_optimizer

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("end", ["well", "in an error"])
def test_nothing_of_a_fit_is_kept_alive(end: str, tmp_path: Path) -> None:
    """When a fit is over the guard holds neither the trainer nor the module, however it ended."""
    guard = NaNGuard(dirpath=tmp_path, last_good_every_n_steps=4)

    class Raises(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if end != "well" and batch_idx == 7:
                raise KeyError("mine")

    def run() -> list[weakref.ref[Any]]:
        trainer, module = trainer_for(tmp_path, guard, [Raises()]), task()
        try:
            trainer.fit(module, torch.utils.data.DataLoader(with_bad(5), batch_size=None))
        except KeyError as error:
            error.__traceback__ = None
        return [weakref.ref(trainer), weakref.ref(module)]

    with pytest.warns(UserWarning, match="validation_step"):
        alive = run()
    gc.collect()
    assert [one() for one in alive] == [None, None]
    assert len(guard.interventions) == 1


class WithTrainerOptions(LightningModule):
    """Takes the Trainer's callbacks as an argument and saves it with its hyperparameters, as some packages do."""

    def __init__(self, callbacks: list[Callback], width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.callbacks = callbacks
        self.net = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_models_saved_with_their_guard_load_again(tmp_path: Path) -> None:
    """A checkpoint whose hyperparameters hold a guard is loaded with ``weights_only``, and the guard with it."""
    guard = NaNGuard(
        [NonFinite(), DivergingLoss()], [Rollback(), ReduceLR(0.5)], dirpath=tmp_path, budget=Budget(max_rollbacks=7)
    )
    module = WithTrainerOptions([guard])
    trainer = trainer_for(tmp_path, None, module.callbacks, max_epochs=1)
    trainer.fit(module, torch.utils.data.DataLoader(with_bad(5), batch_size=None))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    again = WithTrainerOptions.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    (read,) = again.callbacks
    assert isinstance(read, NaNGuard)
    assert [type(one) for one in read._arguments.remedies] == [Rollback, ReduceLR]
    assert read._arguments.budget == Budget(max_rollbacks=7)
    assert read._arguments.dirpath == tmp_path
    fit(task(), with_bad(3), read)
    assert read.interventions[-1].batch_idx == 3


def test_a_default_guard_survives_weights_only() -> None:
    """Whatever its arguments, as long as they are of this package."""
    guard = loaded({"guard": NaNGuard(act_on="evidence", max_snapshots=5)})["guard"]
    assert (guard._arguments.act_on, guard._arguments.max_snapshots) == ("evidence", 5)
    assert loaded(NaNGuard()).interventions == []


def test_a_fit_goes_on_as_it_was_when_its_guard_is_copied(tmp_path: Path) -> None:
    """A copy made in mid-fit leaves no trace in the run."""
    runs = []
    for copied in (False, True):
        guard = NaNGuard(dirpath=tmp_path / str(copied), snapshot_every_n_steps=4)
        callbacks = [FaultAt("gradient", math.nan, 9), *([Copies(guard, "deep copy")] if copied else [])]
        runs.append(state_of(fit(task(), batches(count=24), guard, callbacks=callbacks)))
    assert differences(*runs) == []


def test_a_loop_called_by_hand_after_a_fit_is_left_in_peace(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Batches trained on when the fit is over are neither guarded nor an error; it is said once."""
    guard = NaNGuard(dirpath=tmp_path)
    run = fit(task(), batches(count=4), guard)
    with caplog.at_level("INFO", "lightning_nanguard"):
        for index, batch in enumerate(batches(count=2)):
            guard.on_train_batch_start(run.trainer, run.module, batch, index)
            guard.on_before_backward(run.trainer, run.module, torch.ones(()))
            guard.on_before_optimizer_step(run.trainer, run.module, run.trainer.optimizers[0])
            guard.on_train_batch_end(run.trainer, run.module, None, batch, index)
    assert caplog.text.count("a batch was trained outside of a fit") == 1
    assert list(guard.interventions) == []
