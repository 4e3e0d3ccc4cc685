"""Law 8: no checkpoint written by any path holds what was finite when fit began and is not, and none is left out."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning.callbacks as stock
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.plugins.io import AsyncCheckpointIO
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_nanguard import NaNGuard, TrainingDivergedError
from tests.checkpoints.saving_paths import (
    LOST_AFTER,
    ONE_BY_ONE,
    PER_EPOCH,
    Die,
    Saving,
    Way,
    assert_none_poisoned,
    by_strategy,
    checkpoint,
    crash,
    hook,
    model,
    own_layout,
    train,
)
from tests.helpers import batches, copied, differences, learner_of, non_finite, trainer_for

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.usefixtures("own_folder"),
]


SAVES: dict[str, Way] = {
    "every step": model(every_n_train_steps=1),
    "every epoch": model(every_n_epochs=1),
    "time interval": model(train_time_interval=timedelta(microseconds=1)),
    "train epoch end": model(every_n_epochs=1, save_on_train_epoch_end=True),
    "validation end": model(every_n_epochs=1, save_on_train_epoch_end=False),
    "monitor": model(monitor="val_loss", save_top_k=2, filename="{step}"),
    "monitor at steps": model(monitor="loss", save_top_k=-1, every_n_train_steps=1, filename="{step}"),
    "save_last": model(every_n_train_steps=4, save_last=True),
    "save_last link": model(every_n_train_steps=4, save_last="link"),
    "weights only": model(every_n_train_steps=1, save_weights_only=True),
    "async": Way(
        lambda folder: [checkpoint(folder, every_n_train_steps=1)], lambda: {"plugins": [AsyncCheckpointIO()]}
    ),
    "OnExceptionCheckpoint": Way(lambda folder: [OnExceptionCheckpoint(folder), Die(crash)], ends=ZeroDivisionError),
    "SLURM": Way(
        lambda folder: [Die(lambda: os.kill(os.getpid(), signal.SIGUSR1))],
        lambda: {"plugins": [SLURMEnvironment(auto_requeue=True)]},
    ),
    "user in on_before_zero_grad": Way(hook("on_before_zero_grad")),
    "user in on_before_backward": Way(hook("on_before_backward")),
    "user in on_after_backward": Way(hook("on_after_backward")),
    "user in on_before_optimizer_step": Way(hook("on_before_optimizer_step")),
    "user in on_train_batch_start": Way(hook("on_train_batch_start")),
    "user in on_train_batch_end": Way(hook("on_train_batch_end")),
    "user in on_train_epoch_end": Way(hook("on_train_epoch_end")),
    "user in on_validation_start": Way(hook("on_validation_start")),
    "user in on_validation_end": Way(hook("on_validation_end")),
    "user in on_train_end": Way(hook("on_train_end")),
    "user, weights only": Way(hook("on_train_batch_end", weights_only=True)),
    "user in training_step, before": Way(places=("training_step before",)),
    "user in training_step, after": Way(places=("training_step after",)),
    "user in optimizer_step": Way(places=("optimizer_step",)),
    "user in the module's on_train_batch_end": Way(places=("module's on_train_batch_end",)),
    "strategy": Way(hook("on_train_batch_end", by_strategy)),
    "strategy, a copy": Way(hook("on_train_batch_end", by_strategy, copy=True)),
    "strategy, own layout": Way(hook("on_train_batch_end", own_layout)),
}
if hasattr(ModelCheckpoint(), "save_on_exception"):
    SAVES["save_on_exception"] = Way(
        lambda folder: [checkpoint(folder, every_n_epochs=1, save_on_exception=True), Die(crash)],
        ends=ZeroDivisionError,
    )
    SAVES["SIGTERM"] = Way(
        lambda folder: [
            checkpoint(folder, every_n_epochs=1, save_on_exception=True),
            Die(lambda: os.kill(os.getpid(), signal.SIGTERM)),
        ],
        ends=SIGTERMException,
    )


@pytest.mark.filterwarnings("ignore:.*fit\\(ckpt_path=")
@pytest.mark.parametrize("name", SAVES)
def test_no_poisoned_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever saves, and whatever is lost right before: as many files as in a healthy run, at the same clock, all
    finite, the mask in place, and the intervention on record.
    """
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    _, _, files = train(SAVES[name], tmp_path / "healthy", "nothing", None)
    healthy = {file: content.get("global_step") for file, content in files.items()}
    one_by_one = ("weight", "buffer", "moment") if name in ONE_BY_ONE else ()
    for fault in ("state", "gradient", *one_by_one):
        guard = NaNGuard(snapshot_every_n_steps=2)
        _, module, files = train(SAVES[name], tmp_path / fault, fault, guard)
        assert_none_poisoned(files)
        saved = {file: content.get("global_step") for file, content in files.items()}
        if "training_step" in name:
            # A step that is made again saves again.
            assert {*saved.values()} == {*healthy.values()}, fault
        else:
            assert saved == healthy, fault
        assert len(guard.interventions) >= 1, fault
        assert non_finite(dict(module.named_parameters())) == [], fault


@pytest.mark.parametrize("readback", ["step", "deferred"])
@pytest.mark.parametrize("name", ["every step", "weights only", "async", "strategy", "user in training_step, after"])
def test_fault_seen_only_after_the_save_was_asked_for(name: str, readback: str, tmp_path: Path) -> None:
    """In deferred readback a NaN gradient has reached the weights when a save is asked for: what is on its way is read
    first, and the file holds the state from before.
    """
    guard = NaNGuard(snapshot_every_n_steps=2, readback=readback)
    _, module, files = train(SAVES[name], tmp_path / "run", "gradient", guard)
    assert_none_poisoned(files)
    assert {i.fault for i in guard.interventions} >= {"non_finite_gradient"}
    assert non_finite(dict(module.named_parameters())) == []


def test_the_last_good_state_is_what_is_written(tmp_path: Path) -> None:
    """In the place of a lost state the file holds, bit by bit, what the run goes on from, at the clock of now."""
    seen: list[Any] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == LOST_AFTER:
                trainer.save_checkpoint(tmp_path / "lost.ckpt")
                seen.append(copied(learner_of(trainer, pl_module)))

    guard = NaNGuard(snapshot_every_n_steps=2)
    train(Way(lambda folder: [Look()]), tmp_path / "run", "weight", guard)
    content = torch.load(tmp_path / "lost.ckpt", weights_only=True)
    assert differences(dict(content["state_dict"]), {**seen[0]["parameters"], **seen[0]["buffers"]}) == []
    assert differences(content["optimizer_states"], seen[0]["optimizers"]) == []
    (record,) = guard.interventions
    assert record.remedies == ("restore", "redo")
    assert content["global_step"] == record.global_step == LOST_AFTER > record.snapshot_step


def test_a_rewritten_file_holds_the_last_good_state(tmp_path: Path) -> None:
    """A dictionary that a user collected from lost weights is written with those of the last good state, and the run
    itself is left to the guard's usual moment.
    """
    before: dict[int, Any] = {}

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            before[trainer.global_step] = copied(learner_of(trainer, pl_module))
            if trainer.global_step == LOST_AFTER:
                content = trainer._checkpoint_connector.dump_checkpoint()
                trainer.strategy.save_checkpoint(copied(content), tmp_path / "lost.ckpt")
                assert non_finite(dict(pl_module.named_parameters())) != []

    guard = NaNGuard(snapshot_every_n_steps=1)
    train(Way(lambda folder: [Look()]), tmp_path / "run", "weight", guard)
    content = torch.load(tmp_path / "lost.ckpt", weights_only=True)
    record = guard.interventions[0]
    assert (record.fault, record.remedies) == ("poisoned_checkpoint", ("rewrite",))
    assert "lost.ckpt" in record.message
    matches = [
        step
        for step, state in before.items()
        if step < LOST_AFTER  # later on the run itself goes back to it
        and not differences(dict(content["state_dict"]), {**state["parameters"], **state["buffers"]})
        and not differences(content["optimizer_states"], state["optimizers"])
    ]
    assert len(matches) == 1
    assert matches[0] >= LOST_AFTER - 3
    assert content["global_step"] == LOST_AFTER


AVERAGES: dict[str, Callable[[], Callback]] = {
    name: make
    for name, make in {
        "WeightAveraging": lambda: stock.WeightAveraging(use_buffers=False),
        "EMAWeightAveraging": lambda: stock.EMAWeightAveraging(decay=0.9, use_buffers=False),
    }.items()
    if hasattr(stock, name)
}


@pytest.mark.parametrize("fault", ["weight", "moment", "average"])
@pytest.mark.parametrize(
    ("name", "saves"),
    [
        *(("WeightAveraging", saves) for saves in ("every step", "monitor", "async", "strategy, a copy")),
        ("EMAWeightAveraging", "user in optimizer_step"),
    ],
)
@pytest.mark.skipif(not AVERAGES, reason="this Lightning has no WeightAveraging")
def test_averages_in_the_file(name: str, saves: str, fault: str, tmp_path: Path) -> None:
    """The average, which such a checkpoint holds as its weights, and the training weights beside it are both good."""
    guard = NaNGuard(snapshot_every_n_steps=2)
    _, _, files = train(
        SAVES[saves],
        tmp_path / "run",
        fault,
        guard,
        lambda: [AVERAGES[name]()],
        lambda others: dict(others[0]._average_model.named_parameters()),
    )
    assert_none_poisoned(files)
    for content in files.values():
        assert non_finite(content["current_model_state"]) == []
        assert differences(content["state_dict"], content["current_model_state"]) != []
    assert len(guard.interventions) >= 1


@pytest.mark.skipif(not AVERAGES, reason="this Lightning has no WeightAveraging")
@pytest.mark.parametrize("hook_name", ["on_train_batch_end", "on_validation_batch_start"])
def test_save_while_the_average_is_validated(hook_name: str, tmp_path: Path) -> None:
    """A weight lost before or during a validation in which the average stands in for the weights: a file saved there is
    good, and afterwards weights and average are each in their own place.
    """
    average = stock.WeightAveraging(use_buffers=False)
    guard = NaNGuard(snapshot_every_n_steps=1)
    known: list[tuple[Any, Any]] = []
    later: list[tuple[Any, Any]] = []
    spoilt: list[int] = []

    def both(module: Any) -> tuple[Any, Any]:
        weights, averages = module.named_parameters(), average._average_model.module.named_parameters()
        return copied(dict(weights)), copied(dict(averages))

    class Spoil(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            known.append(both(pl_module))
            if hook_name == "on_train_batch_end":
                self.spoil(trainer, pl_module)

        def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            if hook_name == "on_validation_batch_start":
                self.spoil(trainer, pl_module)

        def spoil(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.global_step == PER_EPOCH and not spoilt:
                spoilt.append(trainer.global_step)
                with torch.no_grad():
                    pl_module.net.one.weight[0, 0] = math.nan

        def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == PER_EPOCH:
                trainer.save_checkpoint(tmp_path / "one.ckpt")

        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == PER_EPOCH:
                later.append(both(pl_module))

    train(Way(lambda folder: [Spoil(), checkpoint(folder)]), tmp_path / "run", "nothing", guard, lambda: [average])
    content = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert non_finite({key: content[key] for key in ("state_dict", "current_model_state", "optimizer_states")}) == []
    weights, averages = known[PER_EPOCH - 1]
    assert differences(weights, later[0][0]) == []
    remedies = [one.remedies for one in guard.interventions]
    if hook_name == "on_validation_batch_start":  # the average alone was lost: it is that of an earlier update
        assert any(not differences(earlier, later[0][1]) for _, earlier in known[:PER_EPOCH])
        assert ("restore averages",) in remedies
    else:  # all updates were made again before the average took the place of the weights
        assert differences(averages, later[0][1]) == []
        assert ("restore", "redo") in remedies


class LateEMA(Callback):
    """An average that a user begins in the middle of a run, and keeps in the checkpoint."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step >= LOST_AFTER - 1:
            for name, value in pl_module.named_parameters():
                self.average[name] = 0.9 * self.average.get(name, value.detach()) + 0.1 * value.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}


def test_an_average_younger_than_every_snapshot(tmp_path: Path) -> None:
    """An average that no snapshot holds begins anew from the restored weights where it was lost."""
    ema = LateEMA()
    guard = NaNGuard(snapshot_every_n_steps=50)
    _, _, files = train(
        SAVES["every step"], tmp_path / "run", "average", guard, lambda: [ema], lambda others: ema.average
    )
    assert_none_poisoned(files)
    for content in files.values():
        assert non_finite(content["callbacks"].get("LateEMA", {})) == []
    assert len(guard.interventions) >= 1


def test_observing_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    """With observe=True the file is what it is without the guard, and a record says what is in it."""
    guard = NaNGuard(observe=True)
    _, _, files = train(SAVES["every step"], tmp_path / "guarded", "weight", guard)
    _, _, bare = train(SAVES["every step"], tmp_path / "bare", "weight", None)
    for name, content in files.items():
        assert differences(content["state_dict"], bare[name]["state_dict"]) == []
    assert not any(i.applied for i in guard.interventions)
    assert guard.interventions[0].fault == "corrupted_state"


def test_healthy_files_are_the_same(tmp_path: Path) -> None:
    """Without a fault every file holds what it holds without the guard."""
    for name in ("every step", "monitor", "strategy, own layout"):
        made = []
        for guard in (None, NaNGuard()):
            _, _, files = train(SAVES[name], tmp_path / f"{name} {guard is None}", "nothing", guard)
            for content in files.values():
                content.pop("callbacks", None)  # best paths lie in folders of their own
            made.append(files)
        assert differences(made[0], made[1]) == []


@pytest.mark.filterwarnings("ignore:.*fit\\(ckpt_path=")
def test_nothing_good_at_all(tmp_path: Path) -> None:
    """A run that is stopped before anything was proven good leaves what it began with in a file asked for by it."""
    module = Saving()
    data = batches(count=4)

    class Poison(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            with torch.no_grad():
                pl_module.net.one.weight[0, 0] = math.nan
                pl_module.net.one.weight[0, 1] += 1.0  # else the state of the start is known to be good

    callbacks = [Poison(), OnExceptionCheckpoint(tmp_path)]
    trainer = trainer_for(tmp_path, NaNGuard(), callbacks, enable_checkpointing=True)
    with pytest.raises(TrainingDivergedError, match="no good state"):
        trainer.fit(module, DataLoader(data, batch_size=None), DataLoader(data[:1], batch_size=None), ckpt_path=None)
    content = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert_none_poisoned({"on_exception.ckpt": content})
