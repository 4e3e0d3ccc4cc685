"""Every save is looked at before it is written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from lightning_nanguard.trainer.private import saving
from lightning_nanguard.trainer.private.saving import catch_write_errors, write_checkpoint
from tests.helpers import batches, fit, task


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
