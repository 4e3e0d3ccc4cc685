"""Writing the guard's own checkpoint through the trainer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from lightning_nanguard.trainer.private.checkpoint_files import catch_write_errors, write_checkpoint
from tests.helpers import batches, fit, task


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
