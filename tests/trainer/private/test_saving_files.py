"""Writing the last good checkpoint through the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning import Callback

from lightning_nanguard.trainer.private.saving_files import after_every_batch, forgive, write_through
from tests.helpers import batches, fit, task


class Notes(Callback):
    """Asks to be followed at the end of every batch, by what comes behind all callbacks."""

    def __init__(self) -> None:
        self.order: list[str] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.undo = after_every_batch(trainer, lambda: self.order.append("behind"))

    def on_train_batch_end(self, *args: Any) -> None:
        self.order.append("callback")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.undo()


def test_behind_all_callbacks() -> None:
    """The function is called after the last callback of each batch, and is gone when it is undone."""
    notes = Notes()
    run = fit(task(), batches(count=2), callbacks=[notes])
    assert notes.order == ["callback", "behind"] * 2
    assert len(run.trainer.callbacks) == 1


def test_errors_in_one_file_are_forgiven(tmp_path: Path) -> None:
    """An error in writing the last good file is told and not raised; in any other file it is raised."""
    run = fit(task(), batches(count=1))
    (tmp_path / "file").touch()
    ours, theirs, failed = tmp_path / "file" / "ours.ckpt", tmp_path / "file" / "theirs.ckpt", list[Exception]()
    undo = forgive(run.trainer.strategy, ours, failed.append)
    write_through(run.trainer, ours)
    assert len(failed) == 1
    with pytest.raises(OSError, match="file"):
        write_through(run.trainer, theirs)
    undo()
    with pytest.raises(OSError, match="file"):
        write_through(run.trainer, ours)
