"""What each rank runs for ``test_saves.py``: Trainer fits under DDP that write checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_nanguard import NaNGuard
from lightning_nanguard.checkpoints.inspection import inspect
from lightning_nanguard.record.files import LAST_GOOD
from tests.distributed.data import spoilt


class Lose(Callback):
    """One rank loses a weight after a batch, right before a save."""

    hits = 0

    def __init__(self, rank: int, after: int) -> None:
        self.rank = rank
        self.left = after

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.left -= 1
        if self.left == 0 and trainer.global_rank == self.rank:
            with torch.no_grad():
                next(pl_module.parameters()).view(-1)[0] = math.nan


def saves(worker: Any) -> None:
    """A checkpoint after every update, and the last good one, with a weight lost on each rank."""
    folder: Path = worker.folder
    for rank in range(worker.world):
        place = folder / f"lost {rank}"
        checkpoint = ModelCheckpoint(place / "checkpoints", every_n_train_steps=1, save_top_k=-1)
        guard = NaNGuard(snapshot_every_n_steps=2, dirpath=place / "nanguard", last_good_every_n_steps=3)
        worker.fit(f"lost {rank}", None, Lose(rank, 7), checkpoint, guard=guard, enable_checkpointing=True)
        files = sorted(place.rglob("*.ckpt"))
        worker.results[f"lost {rank}"] |= {
            "files": len(files),
            "bad": [file.name for file in files if not inspect(file).good()],
            "kept": inspect(place / "nanguard" / LAST_GOOD).global_step,
        }
    # A fault that is still on its way when a save is asked for.
    checkpoint = ModelCheckpoint(folder / "late", every_n_train_steps=1, save_top_k=-1)
    guard = NaNGuard(snapshot_every_n_steps=2, readback="deferred")
    worker.fit("late", None, checkpoint, data=spoilt(1), guard=guard, enable_checkpointing=True)
    files = sorted((folder / "late").rglob("*.ckpt"))
    worker.results["late"]["bad"] = [file.name for file in files if not inspect(file).good()]
    # Two epochs at once, and with a stop after the first.
    checkpoint = ModelCheckpoint(folder / "epochs", every_n_epochs=1, save_top_k=-1)
    worker.fit("two epochs", None, checkpoint, enable_checkpointing=True, max_epochs=2)
    (first,) = (folder / "epochs").glob("epoch=0*")
    worker.fit("resumed", max_epochs=2, ckpt_path=first)
    # A folder that cannot be made is met by rank 0 alone.
    blocked = folder / "blocked"
    if not blocked.exists():
        blocked.write_text("a file where a folder should be")
    guard = NaNGuard(snapshot_every_n_steps=2, dirpath=blocked / "nanguard", last_good_every_n_steps=3)
    worker.fit("blocked", guard=guard)
