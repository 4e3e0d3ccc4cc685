"""Beside Lightning's own callbacks and a user's: no harm in healthy runs, and none of them is poisoned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
)
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from lightning_nanguard import NaNGuard
from tests.helpers import (
    Task,
    batches,
    copied,
    differences,
    mlp,
    state_of,
    with_bad,
    words,
)
from tests.modules import NaNWeight, make
from tests.scenarios.companions import (
    BAD_BATCH,
    BAD_WEIGHT,
    COMPANIONS,
    EPOCHS,
    PER_EPOCH,
    assert_clean,
    averages_of,
    companions,
    saved_in,
    train,
)

pytestmark = [
    # Lightning's own advice and notes about what these tests do on purpose.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
    pytest.mark.usefixtures("own_folder"),
]


@pytest.mark.parametrize("name", COMPANIONS)
def test_no_harm(name: str, tmp_path: Path) -> None:
    """A healthy run with a companion has the same bits with and without the guard, wherever it is listed; after the fit
    its place is the one it was given."""

    def left(which: str) -> tuple[Any, ...]:
        others = companions(tmp_path / which)[name]()
        guard = None if which == "bare" else NaNGuard(snapshot_every_n_steps=2)
        run = train(others, guard, first=which == "first", norm=True)
        files = {file.name: torch.load(file, weights_only=True) for file in saved_in(tmp_path / which)}
        for content in files.values():
            content["callbacks"] = {k: v for k, v in content["callbacks"].items() if k.startswith("EarlyStopping")}
        averages = [copied(averages_of(c)) for c in others if hasattr(c, "tensors") or hasattr(c, "_average_model")]
        if guard is not None:
            # Lightning lists checkpoints last.
            place = 0 if which == "first" else sum(not isinstance(one, ModelCheckpoint) for one in others)
            assert run.trainer.callbacks[place] is guard
            assert list(guard.interventions) == []
        return state_of(run), averages, files

    bare = left("bare")
    for where in ("first", "last"):
        assert differences(bare, left(where)) == []


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("name", COMPANIONS)
def test_nothing_is_poisoned(name: str, first: bool, tmp_path: Path) -> None:
    """After a NaN batch in each epoch and a lost weight no companion holds NaN, stops the run, or has written NaN to a
    file."""
    others = companions(tmp_path)[name]()
    guard = NaNGuard(snapshot_every_n_steps=2)
    data = with_bad(BAD_BATCH - PER_EPOCH, count=PER_EPOCH)
    run = train(others, guard, data=data, faults=[NaNWeight(BAD_WEIGHT)], first=first)
    assert sorted(one[0] for one in words(guard)) == ["restore", *["skip"] * EPOCHS]
    assert run.trainer.current_epoch == EPOCHS
    assert_clean(run, others, tmp_path)


class Tunable(Task):
    """A task whose batch size and rate a tuner may set."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.lr = 0.01
        self.batch_size = 4
        x, y = batches(count=1, size=96)[0]
        self.dataset = TensorDataset(x, y)
        self.make_optimizer = lambda parameters: SGD(parameters, lr=self.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=self.batch_size)


@pytest.mark.parametrize("tuner", ["batch size", "learning rate"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_tuners(tuner: str, first: bool, tmp_path: Path) -> None:
    """A tuner comes to the same result with the guard beside it, and the guard stands right behind it."""
    results = {}
    for guarded in (False, True):
        torch.manual_seed(0)
        guard = NaNGuard()
        finder = (
            BatchSizeFinder(mode="power", steps_per_trial=1, init_val=4, max_trials=3)
            if tuner == "batch size"
            else LearningRateFinder(num_training_steps=20)
        )
        listed: list[Callback] = [finder]
        if guarded:
            listed = [guard, finder] if first else [finder, guard]
        module = Tunable()
        trainer = Trainer(
            callbacks=listed,
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module)
        if guarded:
            assert trainer.callbacks.index(guard) == 1
            assert trainer.callbacks[0] is finder
            assert list(guard.interventions) == []
        results[guarded] = (module.batch_size, module.lr, copied(dict(module.named_parameters())))
    assert differences(results[False], results[True]) == []


def test_two_epochs_of_everything_at_once(tmp_path: Path) -> None:
    """All companions together live through a bad batch and a lost weight."""
    known = companions(tmp_path)
    others = [c for name in ("early stopping", "top k", "rate monitor", "timer", "dictionary") for c in known[name]()]
    data = with_bad(4, count=PER_EPOCH)
    guard = NaNGuard(snapshot_every_n_steps=2)
    run = train(others, guard, data=data, faults=[NaNWeight(BAD_WEIGHT)])
    assert [w for w in words(guard) if w != ("skip",)] == [("restore",)]
    assert words(guard).count(("skip",)) == EPOCHS
    assert_clean(run, others, tmp_path)
    assert isinstance(run.module, type(make()()))
