"""One life of a run: it goes on from what the life before has left, and says in shared memory what it is at."""

from __future__ import annotations

import functools
import logging
import math
import mmap
import os
import struct
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_nanguard import NaNGuard
from lightning_nanguard.checkpoints import last_good
from lightning_nanguard.checkpoints.inspection import inspect
from lightning_nanguard.checkpoints.poison import KnownWeights
from lightning_nanguard.record import jsonl
from lightning_nanguard.record.files import LAST_GOOD, read_records
from lightning_nanguard.state import snapshot_placement
from lightning_nanguard.state.finite import allowances

PHASES = ("setup", "step", "snapshot", "save", "last good", "record", "end")
PER_EPOCH = 40
TEMPORARY = "temporary"


class Shared:
    """Numbers that outlive the process that wrote them.

    Attributes are fields of shared memory: ``phase`` (index into :data:`PHASES`), ``step`` (updates made),
    ``resumed`` (step gone on from), ``records`` (known to be on the disk), ``kept`` (step of the last good file known
    to be in its place).
    """

    _fields = ("phase", "step", "resumed", "records", "kept")

    def __init__(self) -> None:
        object.__setattr__(self, "_memory", mmap.mmap(-1, 8 * len(self._fields)))

    def __getattr__(self, name: str) -> int:
        return int(struct.unpack_from("q", self._memory, 8 * self._fields.index(name))[0])

    def __setattr__(self, name: str, value: int) -> None:
        struct.pack_into("q", self._memory, 8 * self._fields.index(name), value)


class Net(nn.Module):
    """Large enough for a save to take a while, with statistics and a mask of −inf."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 200)
        self.norm = nn.BatchNorm1d(200)
        self.middle = nn.Linear(200, 200)
        self.two = nn.Linear(200, 2)
        self.register_buffer("mask", torch.full((8, 8), -math.inf).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.middle(torch.tanh(self.norm(self.one(x))))))


class Task(LightningModule):
    """Regression; some batches are NaN, and now and then a weight is lost, so that there is something to record."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = (self.net(x) - y).square().mean() * (math.nan if batch_idx % 7 == 6 else 1.0)
        self.log("score", loss.detach().nan_to_num(9.0))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Watch(Callback):
    """Says how far the run is, loses a weight at times, and ends the run after so many updates."""

    def __init__(self, shared: Shared, updates: int) -> None:
        self.shared = shared
        self.left = updates
        self.made = 0
        self.parent = os.getppid()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.shared.resumed = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if os.getppid() != self.parent:
            os._exit(1)  # nobody is left who would kill it
        self.shared.phase = PHASES.index("step")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.shared.step = trainer.global_step
        self.made += 1
        # Not before a batch was good: until then nothing is certified.
        if self.made % 11 == 10:
            with torch.no_grad():
                pl_module.net.one.weight[0, 0] = math.nan
        self.left -= 1
        if self.left == 0:
            trainer.should_stop = True
            trainer.fit_loop.max_epochs = trainer.current_epoch + 1


def _mark(shared: Shared, owner: Any, name: str, phase: str, after: Callable[..., None] | None = None) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def marked(*args: Any, **kwargs: Any) -> Any:
        before, shared.phase = shared.phase, PHASES.index(phase)
        try:
            result = original(*args, **kwargs)
            if after is not None:
                after(*args, **kwargs)
            return result
        finally:
            shared.phase = before

    setattr(owner, name, marked)


def _mark_all(shared: Shared) -> None:
    written = {"step": 0}

    def note_written(trainer: Any, path: Path) -> None:
        written["step"] = trainer.global_step

    def note_kept(new: Path, old: Path) -> None:
        shared.kept = written["step"]

    def note_record(file: Any, line: bytes, **_: Any) -> None:
        shared.records += 1

    _mark(shared, snapshot_placement, "capture", "snapshot")
    _mark(shared, TorchCheckpointIO, "save_checkpoint", "save")
    from lightning_nanguard.trainer import fit

    _mark(shared, fit, "write_checkpoint", "last good", note_written)
    _mark(shared, last_good, "_replace", "last good", note_kept)
    _mark(shared, jsonl, "append", "record", note_record)


def examine(folder: Path, shared: Shared, *, may_be_torn: bool) -> dict[str, Any]:
    """What is on the disk after a death.

    Args:
        folder: The run's.
        shared: What the dead knew to be there.
        may_be_torn: Whether files of the user's ModelCheckpoint may be: they are copied from another file system.

    Returns:
        Numbers of files found good and torn, and in words what should not be.
    """
    weights = dict([*(module := Task()).named_parameters(), *module.named_buffers()])
    allowed = allowances((("buffer", name), buffer) for name, buffer in module.named_buffers())
    files, torn, wrong = 0, 0, []
    for file in sorted(folder.rglob("*.ckpt")):
        found = inspect(file, KnownWeights(weights, allowed))
        files += 1
        if found.damage and may_be_torn and file.name != LAST_GOOD:
            torn += 1
        elif not found.good():
            wrong.append(f"{file.name}: {found.damage or found.tensors}")
        if file.name == LAST_GOOD and (found.global_step or 0) < shared.kept:
            wrong.append(f"{file.name} is of step {found.global_step}, step {shared.kept} was in its place")
    if shared.kept and not (folder / "nanguard" / LAST_GOOD).exists():
        wrong.append(f"{LAST_GOOD} is gone")
    path = folder / "nanguard" / "interventions.jsonl"
    records = len(read_records(path)) if path.exists() else 0
    if records < shared.records:
        wrong.append(f"{records} records of {shared.records}")
    shared.records = records
    return {"files": files, "torn": torn, "records": records, "wrong": wrong}


def live(folder: Path, shared: Shared, *, updates: int, from_last_good: bool, elsewhere: Path | None) -> dict[str, Any]:
    """Go on from what is there, for so many updates.

    Args:
        folder: The run's.
        shared: Where it says what it is at.
        updates: After how many it ends by itself.
        from_last_good: Whether it goes on from the guard's file or from ModelCheckpoint's last.
        elsewhere: A folder on another file system for temporary files, ``None`` for one beside the checkpoints.
    """
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "lightning_nanguard"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")
    temporary = elsewhere if elsewhere is not None else folder / TEMPORARY
    temporary.mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str(temporary)
    _mark_all(shared)
    kept, last = folder / "nanguard" / LAST_GOOD, folder / "checkpoints" / "last.ckpt"
    chosen = next((path for path in ((kept, last) if from_last_good else (last, kept)) if path.exists()), None)
    seed_everything(1, verbose=False)
    source = torch.Generator().manual_seed(1)
    data = [(x := torch.randn(8, 6, generator=source), x[:, :2] - x[:, 2:4]) for _ in range(PER_EPOCH)]
    guard = NaNGuard(
        dirpath=folder / "nanguard", snapshot_every_n_steps=2, last_good_every_n_steps=3, resume="last-good"
    )
    checkpoint = ModelCheckpoint(
        folder / "checkpoints", monitor="score", save_top_k=2, every_n_train_steps=2, save_last=True,
        enable_version_counter=False,
    )  # fmt: skip
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        callbacks=[Watch(shared, updates), checkpoint, guard],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Task(), DataLoader(data, batch_size=None), ckpt_path=chosen)
    shared.phase = PHASES.index("end")
    return {"asked for": None if chosen is None else chosen.name, "resumed": shared.resumed, "step": shared.step}
