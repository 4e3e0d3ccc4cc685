"""Trains a draw, and says what it left behind."""

from __future__ import annotations

import math
import random
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.rescue.data import Rows as DataRows
from benchmarks.rescue.models import TASKS
from benchmarks.rescue.running import deadline, held_out_loss, precision_options
from benchmarks.transient.draws import AVERAGES
from benchmarks.transient.running import Rows, ending, scheduled

from .draws import BATCHES, EPOCHS, OPTIMIZERS, SIZE, Draw
from .injector import InjectAround, Injector, strike_gradients
from .observing import LeaveOut, Observer, bad_files, learner, not_finite

TIME_LIMIT = 60
"""Seconds after which a run is said not to end; one takes less than one."""


class Trained(pl.LightningModule):
    """A task of the rescue suite, trained by Lightning or by hand.

    Args:
        one: The draw.
        injector: Spoils it.
        left_out: Numbers of batches that are not to be learned from.
    """

    def __init__(self, one: Draw, injector: Injector, left_out: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(one.seed)
        self.one, self.recipe, self.left_out = one, TASKS[one.task], left_out
        self.net = self.recipe.net()
        self.automatic_optimization = one.mode == "automatic"
        self._injector = lambda: injector  # in a function, so that it is not taken for state of the module
        self._number = [0]
        strike_gradients(self.net, injector, lambda: self._number[0])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        number = self._number[0] = int(batch[-1][0])
        if self._injector().due_in("exception", number):
            raise self._injector().error()
        if self.automatic_optimization:
            return self._loss(batch, number)
        several = self.optimizers()
        for index, optimizer in enumerate(several if isinstance(several, list) else [several]):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self._loss(batch, number, index))
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        return None

    def _loss(self, batch: Any, number: int, index: int = 0) -> Tensor:
        injector = self._injector()
        loss = self.recipe.loss(self.net, batch[:-1], number)
        if injector.due_in("loss", number, index):
            loss = loss * injector.spoil_whole(torch.ones(()))
        if number in self.left_out:
            loss = loss * 0
        noted = loss.detach().clone()
        self.log(f"noted_{index}", injector.spoil_whole(noted) if injector.due_in("metric", number, index) else noted)
        self.log(f"loss_{index}", loss, on_step=True, on_epoch=True, batch_size=SIZE)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        injector = self._injector()
        loss = (self.recipe.held or self.recipe.loss)(self.net, batch, BATCHES * EPOCHS)
        if self.one.kind in ("loss", "exception") and injector.due_now("validation"):
            if self.one.kind == "exception":
                raise injector.error()
            loss = loss * injector.spoil_whole(torch.ones(()))
        self.log("val_loss", loss, batch_size=SIZE)
        return loss

    def configure_optimizers(self) -> Any:
        make, parameters = OPTIMIZERS[self.one.optimizer], list(self.parameters())
        if self.one.mode == "two optimizers":
            half = max(1, len(parameters) // 2)
            return [make(part) for part in (parameters[:half], parameters[half:]) if part]
        return scheduled(make(parameters), self.one.schedule, self.one.steps)


class Collate:
    """Numbers the batches of a run, and spoils the one that is due."""

    def __init__(self, injector: Injector, dtype: torch.dtype) -> None:
        self.injector, self.dtype, self.number = injector, dtype, 0

    def __call__(self, rows: Any) -> list[Tensor]:
        number, self.number = self.number, self.number + 1
        batch = [one.clone().to(self.dtype) if one.is_floating_point() else one.clone() for one in rows]
        for index, kind in ((0, "input"), (1, "target")):
            if self.injector.due_in(kind, number):
                self.injector.spoil(batch[index])
        return [*batch, torch.full((len(batch[0]),), number)]


@dataclass
class Left:
    """What a run has left behind.

    Attributes:
        ended: All that is compared, name and bits; empty where an exception kept it from being there.
        error: Class and message of what ended the run; empty where it reached its end.
        initial: Held-out loss of the untrained model.
        final: Held-out loss in the end.
        not_finite: Names of tensors that are not finite.
        hits: How often it was struck.
        observer: What was seen while it ran.
        bad_files: Checkpoint files that hold what is not finite.
        temporary: Names of files left in the folder for temporary files.
        attributes: Names of attributes and numbers of hooks of trainer, module and optimizers in the end.
        last: Hash of the learner in the end.
        objects: Trainer, module and optimizers, to see that nothing keeps them.
    """

    ended: dict[str, bytes]
    error: str
    initial: float
    final: float
    not_finite: list[str]
    hits: int
    observer: Observer
    bad_files: list[str]
    temporary: list[str]
    attributes: dict[str, Any]
    last: str
    objects: list[Any] = field(default_factory=list)


def train(
    one: Draw,
    injector: Injector,
    folder: Path,
    guard: pl.Callback | None = None,
    *,
    records: Callable[[], Sequence[Any]] = list,
    left_out: tuple[int, ...] = (),
) -> Left:
    """Train a draw from its seed on.

    Args:
        one: The draw.
        injector: Spoils it.
        folder: Where its files go.
        guard: What watches over it.
        records: Gives what the guard has done.
        left_out: Numbers of batches that are not to be learned from.
    """
    module, rows, observer = Trained(one, injector, left_out), Rows(), Observer(records)
    initial = held_out_loss(module.recipe, module.net)
    make = AVERAGES[one.average]
    averages: list[Any] = [] if make is None else [make()]
    others = [observer, *averages, *_companions(one, folder)]
    if left_out:
        # First, so that averages see buffers without the batch.
        others.insert(0, LeaveOut(left_out, one.accumulate))
    watching = [] if guard is None else [guard]
    # The injector comes after the observer: what it spoils in a hook of both is not yet there for the observer.
    around = [*others, InjectAround(injector, averages)]
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)
    before, tempfile.tempdir = tempfile.tempdir, str(scratch)
    error = ""
    try:
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_epochs=EPOCHS, logger=rows, log_every_n_steps=1, num_sanity_val_steps=0,
            accumulate_grad_batches=one.accumulate, gradient_clip_val=one.clip, default_root_dir=folder,
            callbacks=[*watching, *around] if one.first else [*around, *watching],
            enable_checkpointing="checkpoint" in one.companions, enable_progress_bar=False, enable_model_summary=False,
            **_precision(one.precision),
        )  # fmt: skip
        for seed in (torch.manual_seed, random.seed, lambda number: np.random.seed(number % (1 << 32))):
            seed(one.seed)
        try:
            with deadline(TIME_LIMIT):
                trainer.fit(module, *_loaders(one, injector))
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    finally:
        tempfile.tempdir = before
    last, bad = learner(trainer, module), not_finite(module, trainer.optimizers, averages)
    ended = ending(trainer, module, rows, averages)
    module.float()
    final = held_out_loss(module.recipe, module.net)
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:
        ended["/scaler"] = repr(scaler.state_dict()).encode()
    objects = [trainer, module, *trainer.optimizers]
    for name in ("log", "log_dict"):  # Lightning leaves the module's here, which would keep it alive
        vars(observer).pop(name, None)
    return Left(
        ended, error, initial, final, bad, injector.hits, observer, bad_files(folder),
        sorted(path.name for path in scratch.rglob("*")), attributes(objects), last, objects,
    )  # fmt: skip


def _precision(name: str) -> dict[str, Any]:
    return {"precision": name} if name.endswith(("-true", "-mixed")) else precision_options(name)


def _loaders(one: Draw, injector: Injector) -> tuple[DataLoader[Any], DataLoader[Any]]:
    split = TASKS[one.task].data()
    dtype = torch.float64 if one.precision == "64-true" else torch.float32
    # Small data sets are gone through several times in an epoch.
    rows = torch.arange(BATCHES * SIZE) % len(split.train[0])
    train = DataLoader(
        DataRows(tuple(part[rows] for part in split.train)),
        batch_size=SIZE,
        shuffle=True,
        collate_fn=Collate(injector, dtype),
    )
    held = [part[: 2 * SIZE] for part in split.held]
    held = [part.to(dtype) if part.is_floating_point() else part for part in held]
    return train, DataLoader(DataRows(tuple(held)), batch_size=SIZE, collate_fn=list)


def _companions(one: Draw, folder: Path) -> list[pl.Callback]:
    made: list[pl.Callback] = []
    if "checkpoint" in one.companions:
        made.append(
            ModelCheckpoint(
                folder / "saved", every_n_train_steps=5, save_last=True, save_top_k=2, monitor="step", mode="max"
            )
        )
    if "early stopping" in one.companions:
        made.append(EarlyStopping("val_loss", patience=3))
    if "rate monitor" in one.companions:
        made.append(LearningRateMonitor("step"))
    if "weight averaging" in one.companions and one.average == "none":
        made.append(StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1))
    return made


_HOOKS = re.compile(r"^_.*hooks?(_dict)?$")


def attributes(objects: Sequence[Any]) -> dict[str, Any]:
    """Names of the attributes of trainer, module and optimizers, and how many hooks each has."""
    found: dict[str, Any] = {}
    for index, one in enumerate(objects):
        # A scheduler notes on an optimizer that it has stepped, which a GradScaler may prevent in one of the runs.
        found[f"{index} {type(one).__name__}"] = sorted(set(vars(one)) - {"_opt_called"})
        parts = dict(one.named_modules()) if isinstance(one, torch.nn.Module) else {"": one}
        for name, part in parts.items():
            for key, value in vars(part).items():
                if _HOOKS.match(key) and isinstance(value, Mapping):
                    found[f"{index}.{name}.{key}"] = len(value)
    for name, parameter in objects[1].named_parameters():
        hooks = (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None))
        found[f"hooks of {name}"] = [len(one or ()) for one in hooks]
    return found


def cost(initial: float, final: float, twin: float) -> float:
    """Share of the twin's gain that a run lacks, at most 1."""
    lacks = (final - twin) / (initial - twin) if math.isfinite(final) else 1.0
    return min(1.0, lacks)
