"""Every save is looked at before it is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch.utils.data import DataLoader

from lightning_nanguard.trainer.private import saving
from lightning_nanguard.trainer.private.saving import before_resuming, catch_write_errors, write_checkpoint
from tests.helpers import batches, fit, task, trainer_for


@pytest.mark.parametrize("collects", [False, True])
def test_what_is_called_around_a_save(collects: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the trainer the state is made good first; a dictionary given to the strategy is mended, and only where
    the strategy collects by itself is the state looked at there too. The undo leaves nothing behind."""
    trainer = fit(task(), batches(count=2), folder=tmp_path).trainer
    said: list[str] = []

    def mend(checkpoint: dict[str, Any], path: str, *, checked: bool = False) -> dict[str, Any]:
        said.append(f"mend {Path(path).name} {checked}")
        return {**checkpoint, "mended": True}

    monkeypatch.setattr(saving, "collects", lambda trainer: collects)
    undo = saving.guard_saves(trainer, lambda: said.append("before"), mend, lambda: said.append("after"))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert said == ["before", "mend one.ckpt True", "after"]
    assert torch.load(tmp_path / "one.ckpt", weights_only=True)["mended"]
    said.clear()
    content = trainer._checkpoint_connector.dump_checkpoint()
    trainer.strategy.save_checkpoint(content, tmp_path / "two.ckpt")
    assert said == (["before", "mend two.ckpt True", "after"] if collects else ["mend two.ckpt False"])
    assert torch.load(tmp_path / "two.ckpt", weights_only=True)["mended"]
    said.clear()
    with pytest.raises(OSError, match="File exists"):
        trainer.save_checkpoint(tmp_path / "one.ckpt" / "below")
    assert said == ["before", "mend below True", "after"]
    undo()
    said.clear()
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    assert said == []
    assert "save_checkpoint" not in {*vars(trainer), *vars(trainer.strategy)}


@pytest.mark.parametrize("background", [False, True])
def test_errors_of_one_file_are_caught(background: bool, tmp_path: Path) -> None:
    """An error in writing the guard's file goes to the guard, one in another file to the user."""

    class Full(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            if Path(path).name.startswith("full"):
                raise OSError(f"no space for {Path(path).name}")
            super().save_checkpoint(checkpoint, path)

    inner = Full()
    plugin = AsyncCheckpointIO(inner) if background else inner
    failed: list[Exception] = []

    class Writes(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            undo = catch_write_errors(trainer.strategy, tmp_path / "full", failed.append)
            write_checkpoint(trainer, tmp_path / "full")
            write_checkpoint(trainer, tmp_path / "one.ckpt")
            if not background:
                with pytest.raises(OSError, match="no space for full of the user"):
                    write_checkpoint(trainer, tmp_path / "full of the user")
                undo()

    fit(task(), batches(count=1), folder=tmp_path, plugins=[plugin], callbacks=[Writes()])
    assert [str(error) for error in failed] == ["no space for full"]
    assert torch.load(tmp_path / "one.ckpt", weights_only=True)["global_step"] == 1
    # What is written in the background may come after an undo, so there none is made.
    assert ("save_checkpoint" in vars(inner)) is background


def test_a_strategy_without_a_plugin() -> None:
    """Where a strategy has no plugin that writes, nothing is replaced."""
    strategy = SimpleNamespace(save=1)
    undo = catch_write_errors(strategy, Path("x"), lambda error: None)
    assert vars(strategy) == {"save": 1}
    undo()
    assert vars(strategy) == {"save": 1}


pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")


class Choose:
    """Notes what it is asked, and gives one answer."""

    def __init__(self, answer: Path | None) -> None:
        self.answer = answer
        self.asked: list[tuple[Path, bool, bool]] = []

    def __call__(self, path: Path, content: Mapping[str, Any] | None, error: Exception | None) -> Path | None:
        self.asked.append((path, content is not None, error is not None))
        return self.answer


def test_who_decides_what_a_fit_is_resumed_from(tmp_path: Path) -> None:
    """The judge is asked once per resumed fit, whether the file could be loaded or not, and another file may take its
    place; afterwards nothing is left on the trainer."""
    good, torn = tmp_path / "good.ckpt", tmp_path / "torn.ckpt"
    fit(task(), batches(count=3), folder=tmp_path).trainer.save_checkpoint(good)
    torn.write_bytes(good.read_bytes()[:100])
    data = DataLoader(batches(count=3), batch_size=None)
    trainer = trainer_for(tmp_path, max_epochs=2, limit_val_batches=0)
    for path, answer, asked in (
        (None, None, []),
        (good, None, [(good, True, False)]),
        (good, good, [(good, True, False)]),
        (torn, good, [(torn, False, True)]),
    ):
        judge = Choose(answer)
        undo = before_resuming(trainer, judge)
        trainer.fit(task(), data, data, ckpt_path=path)
        assert judge.asked == asked
        assert trainer.global_step == 6
        undo()
        assert "resume_start" not in vars(trainer._checkpoint_connector)
    undo = before_resuming(trainer, Choose(None))
    with pytest.raises(Exception, match="failed finding central directory"):
        trainer.fit(task(), data, data, ckpt_path=torn)
    undo()
