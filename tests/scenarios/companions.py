"""Lightning's own callbacks and a user's, and a run beside them, shared by the tests of the two."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning.callbacks as stock
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from lightning_nanguard import NaNGuard
from tests.helpers import (
    Batch,
    Run,
    batches,
    fit,
    learner_of,
    non_finite,
    task,
)

HAS_AVERAGING = hasattr(stock, "WeightAveraging")


averaging = pytest.mark.skipif(not HAS_AVERAGING, reason="this Lightning has no WeightAveraging")


BAD_BATCH = 13


BAD_WEIGHT = 18


PER_EPOCH = 10


EPOCHS = 3


class CopyEMA(Callback):
    """A user's moving average that keeps a deep copy of the module."""

    def __init__(self) -> None:
        self.copy: nn.Module | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.copy = copy.deepcopy(pl_module.net)

    def tensors(self) -> dict[str, Tensor]:
        assert self.copy is not None
        return self.copy.state_dict()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        for mine, theirs in zip(self.tensors().values(), pl_module.net.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.mul_(0.9).add_(theirs, alpha=0.1)


class WholeCopyEMA(CopyEMA):
    """The same with a deep copy of the LightningModule."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer_of_it, pl_module._trainer = pl_module._trainer, None
        self.copy = copy.deepcopy(pl_module)
        pl_module._trainer = trainer_of_it

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        for mine, theirs in zip(self.tensors().values(), pl_module.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.mul_(0.9).add_(theirs, alpha=0.1)


class DictEMA(Callback):
    """A user's moving average in a dictionary whose tensors are replaced with every update."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.average = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}

    def tensors(self) -> dict[str, Tensor]:
        return self.average

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        for name, value in pl_module.state_dict().items():
            if value.is_floating_point():
                self.average[name] = 0.9 * self.average[name] + 0.1 * value.detach()


class TrainableEMA(Callback):
    """The same, of the parameters alone."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.average = {name: value.detach().clone() for name, value in pl_module.named_parameters()}

    def tensors(self) -> dict[str, Tensor]:
        return self.average

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        for name, value in pl_module.named_parameters():
            self.average[name].lerp_(value.detach(), 0.1)


EMAS: dict[str, Callable[[], Any]] = {
    "deep copy of a part": CopyEMA,
    "deep copy": WholeCopyEMA,
    "dictionary": DictEMA,
    "parameters": TrainableEMA,
}


def averages_of(callback: Any) -> dict[str, Tensor]:
    if hasattr(callback, "tensors"):
        return dict(callback.tensors())
    model = callback._average_model
    return {} if model is None else dict(model.state_dict())


def companions(folder: Path) -> dict[str, Callable[[], list[Callback]]]:
    """Every companion by name, new at each call."""
    known: dict[str, Callable[[], list[Callback]]] = {
        "early stopping": lambda: [EarlyStopping("val_loss", patience=50, check_finite=True)],
        "top k": lambda: [ModelCheckpoint(folder / "top", monitor="val_loss", save_top_k=2, save_last=True)],
        "every step": lambda: [ModelCheckpoint(folder / "steps", every_n_train_steps=1, save_top_k=-1)],
        "rate monitor": lambda: [LearningRateMonitor("step")],
        "timer": lambda: [Timer("00:01:00:00")],
        "swa": lambda: [StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1)],
        **{name: (lambda make=make: [make()]) for name, make in EMAS.items()},
    }
    if HAS_AVERAGING:
        known["weight averaging"] = lambda: [stock.WeightAveraging()]
        known["ema averaging"] = lambda: [stock.EMAWeightAveraging(decay=0.9)]
    return known


COMPANIONS = sorted(companions(Path()))


def train(
    companions: list[Callback],
    guard: NaNGuard | None,
    *,
    data: list[Batch] | None = None,
    faults: list[Callback] | None = None,
    first: bool = False,
    norm: bool = False,
    **options: Any,
) -> Run:
    """Train with the guard first or last in the list."""
    listed = [*(faults or []), *companions]
    if guard is not None:
        listed = [guard, *listed] if first else [*listed, guard]
    module = task("norm" if norm else "mlp", lambda p: SGD(p, lr=0.05, momentum=0.9), lambda o: StepLR(o, 7, 0.5))
    if any(isinstance(c, StochasticWeightAveraging) for c in companions):
        module.make_scheduler = None
    options = {
        "max_epochs": EPOCHS,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in listed),
        **options,
    }
    return fit(module, data or batches(count=PER_EPOCH), callbacks=listed, val=batches(count=2, seed=5), **options)


def saved_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.ckpt"))


def assert_clean(run: Run, others: list[Callback], folder: Path) -> None:
    assert non_finite(learner_of(run.trainer, run.module)) == []
    for companion in others:
        if hasattr(companion, "tensors") or hasattr(companion, "_average_model"):
            assert non_finite(averages_of(companion)) == []
        if isinstance(companion, ModelCheckpoint):
            assert saved_in(folder) != []
            if companion.monitor is not None:
                assert companion.best_model_score is not None
                assert math.isfinite(float(companion.best_model_score))
    for file in saved_in(folder):
        content = torch.load(file, weights_only=True)
        assert non_finite({k: content[k] for k in ("state_dict", "optimizer_states")}) == [], file.name
