"""Every path on which a run saves, and a run that loses something right before it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_nanguard import NaNGuard
from tests.checkpoints.training import Net
from tests.helpers import Task, batches, copied, non_finite, trainer_for

PER_EPOCH = 6
EPOCHS = 2
LOST_AFTER = 8
# The paths of saving at which a weight, a buffer and a moment are also lost one at a time.
ONE_BY_ONE = ("every epoch", "user in training_step, after", "strategy")


class Saving(Task):
    """Calls ``save`` at chosen places of its own."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(Net())
        self.save: dict[str, Callable[[], None]] = {}

    def at(self, place: str) -> None:
        if self.training and self.trainer.global_step >= LOST_AFTER - 1:
            self.save.get(place, lambda: None)()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.at("training_step before")
        loss = super().training_step(batch, batch_idx)
        self.at("training_step after")
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.at("optimizer_step")

    def on_train_batch_end(self, *args: Any) -> None:
        self.at("module's on_train_batch_end")


class Lose(Callback):
    """After batch ``LOST_AFTER`` one element of a weight, a buffer, a moment or an average is lost, or with ``state``
    one of each of the first three; ``gradient`` makes the gradient of that batch NaN instead.
    """

    def __init__(self, kind: str, averages: Callable[[], dict[str, Tensor]] = dict) -> None:
        self.kind = kind
        self.averages = averages
        self.batches = 0

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        if self.kind == "gradient" and self.batches == LOST_AFTER - 1:
            pl_module.net.one.weight.grad.view(-1)[0] = math.nan

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.batches += 1
        if self.batches != LOST_AFTER:
            return
        net = pl_module.net
        with torch.no_grad():
            if self.kind in ("weight", "state"):
                net.one.weight[0, 0] = math.nan
            if self.kind in ("buffer", "state"):
                net.norm.running_var[0] = math.inf
            if self.kind in ("moment", "state"):
                trainer.optimizers[0].state[net.two.weight]["exp_avg_sq"][0, 0] = math.inf
            if self.kind == "average":
                next(v for v in self.averages().values() if v.is_floating_point()).view(-1)[0] = math.nan


class Hook(Callback):
    """A user's callback that saves at one hook, from the batch on whose end something is lost."""

    def __init__(self, name: str, save: Callable[[Trainer], None]) -> None:
        self.save = save
        setattr(self, name, self.run)

    def run(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step >= LOST_AFTER - 1:
            self.save(trainer)


class Die(Callback):
    """Raises, or sends this process a signal, at the batch after the one on whose end something is lost."""

    def __init__(self, how: Callable[[], None]) -> None:
        self.how = how
        self.batches = 0

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.batches += 1
        if self.batches == LOST_AFTER:
            self.how()


def crash() -> None:
    raise ZeroDivisionError("the user's own")


@dataclass
class Way:
    """How one path saves.

    Attributes:
        callbacks: Makes the callbacks, given the folder.
        options: Of the Trainer.
        places: Places of the module's own at which it saves.
        ends: What ends the fit.
    """

    callbacks: Callable[[Path], list[Callback]] = lambda folder: []
    options: Callable[[], dict[str, Any]] = dict
    places: tuple[str, ...] = ()
    ends: type[BaseException] | None = None


def checkpoint(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, **{"save_top_k": -1, **options})


def numbered(folder: Path, trainer: Trainer, save: Callable[[Path], None]) -> None:
    save(folder / f"{len(list(folder.glob('*.ckpt')))}.ckpt")


def by_trainer(folder: Path, trainer: Trainer, **options: Any) -> None:
    numbered(folder, trainer, lambda path: trainer.save_checkpoint(path, **options))


def by_strategy(folder: Path, trainer: Trainer, copy: bool = False) -> None:
    content = trainer._checkpoint_connector.dump_checkpoint()
    content = copied(content) if copy else content
    numbered(folder, trainer, lambda path: trainer.strategy.save_checkpoint(content, path))


def own_layout(folder: Path, trainer: Trainer) -> None:
    module = trainer.lightning_module
    content = {"model": copied(module.state_dict()), "opt": [copied(o.state_dict()) for o in trainer.optimizers]}
    content["state_dict"] = {}
    numbered(folder, trainer, lambda path: trainer.strategy.save_checkpoint(content, path))


def hook(name: str, save: Callable[..., None] = by_trainer, **options: Any) -> Callable[[Path], list[Callback]]:
    return lambda folder: [Hook(name, partial(save, folder, **options))]


def model(**options: Any) -> Way:
    return Way(lambda folder: [checkpoint(folder, **options)])


def train(
    path: Way,
    folder: Path,
    fault: str,
    guard: NaNGuard | None,
    companions: Callable[[], list[Callback]] = list,
    averages: Callable[[list[Callback]], dict[str, Tensor]] | None = None,
) -> tuple[Trainer, Saving, dict[str, dict[str, Any]]]:
    """Train with one fault; gives every file written, by name."""
    folder.mkdir()
    module = Saving()
    others = companions()
    lose = Lose(fault, (lambda: averages(others)) if averages is not None else dict)
    # The fault comes before, and the guard after, what saves; averages follow the weights in between.
    callbacks = [*others, lose, *path.callbacks(folder)]
    trainer = trainer_for(folder, guard, callbacks, max_epochs=EPOCHS, enable_checkpointing=True, **path.options())
    if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        # Without one Lightning adds its own.
        trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, ModelCheckpoint)]
    module.save = {place: lambda: by_trainer(folder, trainer) for place in path.places}
    loaders = [DataLoader(batches(count=count), batch_size=None) for count in (PER_EPOCH, 2)]
    with pytest.raises(path.ends) if path.ends is not None else nullcontext():
        trainer.fit(module, *loaders)
    files = sorted(folder.rglob("*.ckpt"))
    return trainer, module, {str(file.relative_to(folder)): torch.load(file, weights_only=True) for file in files}


def assert_none_poisoned(files: dict[str, dict[str, Any]]) -> None:
    assert files
    for name, content in files.items():
        parts = {k: v for k, v in content.items() if k not in ("callbacks", "loops")}
        assert non_finite(parts) == [], name
        weights = content["state_dict"] or content["model"]
        assert bool(torch.isneginf(weights["net.mask"]).any()), f"{name} has lost its mask"
