"""The best model of a ModelCheckpoint is one whose metric is finite."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_nanguard import NaNGuard
from lightning_nanguard.trainer.private.best_model import keep_best_finite
from tests.helpers import batches, task, trainer_for

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.usefixtures("own_folder"),
]

TOP_K = (1, 2, -1)


class Scores(Callback):
    """Gives each epoch's metric, under a name for each number of models kept, the next of some values."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for top_k in TOP_K:
            pl_module.log(f"score{top_k}", self.values[trainer.current_epoch])


@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [
        ("min", [math.nan, 3.0, 2.0, math.nan], 2.0),
        ("min", [math.inf, math.nan, 3.0], 3.0),
        ("min", [3.0, -math.inf, 2.0], 2.0),
        ("min", [-math.inf, 5.0, -math.inf, 4.0], 4.0),
        ("max", [math.nan, 1.0, math.inf, 2.0], 2.0),
        ("max", [-math.inf, math.inf, 0.5], 0.5),
        ("min", [math.nan, math.inf, -math.inf], None),
        ("max", [math.nan], None),
    ],
)
def test_best_is_finite(mode: str, values: list[float], best: float | None, tmp_path: Path) -> None:
    """The best model is the one with the best finite metric, in the callback and in every file; none without one."""
    tops = {
        top_k: ModelCheckpoint(
            tmp_path / f"{top_k}", monitor=f"score{top_k}", mode=mode, save_top_k=top_k, filename="{epoch}"
        )
        for top_k in TOP_K
    }
    callbacks = [Scores(values), *tops.values()]
    trainer = trainer_for(tmp_path, NaNGuard(), callbacks, max_epochs=len(values), enable_checkpointing=True)
    data = DataLoader(batches(count=2), batch_size=None)
    trainer.fit(task(), data, data)
    for top_k, top in tops.items():
        if best is None:
            assert (top.best_model_score, top.best_model_path) == (None, "")
        else:
            assert float(top.best_model_score) == best
            assert Path(top.best_model_path).name == f"epoch={values.index(best)}.ckpt"
            assert Path(top.best_model_path).is_file()
        files = list((tmp_path / f"{top_k}").glob("*.ckpt"))
        assert len(files) == (len(values) if top_k == -1 else min(top_k, len(values)))
        for file in files:
            states = [
                state
                for key, state in torch.load(file, weights_only=True)["callbacks"].items()
                if "ModelCheckpoint" in key and f"score{top_k}'" in key
            ]
            assert len(states) == 1
            score = states[0]["best_model_score"]
            assert score is None or math.isfinite(float(score))
        assert not {"check_monitor_top_k", "_update_best_and_save", "_save_checkpoint"} & set(vars(top))


def test_best_of_an_older_run_is_forgotten(tmp_path: Path) -> None:
    """A best of −inf that a run without the guard has left is not taken over."""
    data = DataLoader(batches(count=2), batch_size=None)
    last = None
    for guard, values in ((None, [-math.inf]), (NaNGuard(), [-math.inf, 3.0])):
        top = ModelCheckpoint(tmp_path, monitor="score1", save_top_k=1, filename="{epoch}", save_last=True)
        callbacks = [Scores(values), top]
        trainer = trainer_for(tmp_path, guard, callbacks, max_epochs=len(values), enable_checkpointing=True)
        trainer.fit(task(), data, data, ckpt_path=last)
        last = tmp_path / "last.ckpt"
    assert float(top.best_model_score) == 3.0


def test_other_callbacks_are_left_alone() -> None:
    """Only what is a ModelCheckpoint, of either package, is changed, and the undo leaves nothing behind."""

    class Own(ModelCheckpoint):
        pass

    own, other = Own(), Callback()

    class Holder:
        callbacks = (own, other)

    undo = keep_best_finite(Holder())
    assert "check_monitor_top_k" in vars(own)
    assert not vars(other)
    undo()
    undo()
    assert "check_monitor_top_k" not in vars(own)
