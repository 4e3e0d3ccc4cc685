"""Looks at a run from outside while it trains, and at what is on the disk and in the process afterwards."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loops.fit_loop import _FitLoop
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.transient.running import leaves


class Observer(pl.Callback):
    """Writes down the clock, the state after each update, and when the guard did something.

    Args:
        records: Gives what the guard has done.

    Attributes:
        clock: Global step, epoch, batch index and steps of the schedulers after each batch.
        weights: Hash of the weights after each batch.
        moves: Whether a gradient of each batch was not zero.
        told: Number of records after each batch.
        wrong: In words, restores that are not bitwise their snapshot.
    """

    def __init__(self, records: Callable[[], Sequence[Any]]) -> None:
        self.records = records
        self.clock: list[tuple[int, ...]] = []
        self.weights: list[str] = []
        self.moves: list[bool] = []
        self.told: list[int] = []
        self.wrong: list[str] = []
        self.after: dict[int, str] = {}
        self._looked = 0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.after[trainer.global_step] = learner(trainer, module)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.moves.append(False)
        self._look(trainer, module)  # a state may have been restored while it was saved, or after a validation

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        gradients = [one.grad for one in module.parameters() if one.grad is not None]
        self.moves[-1] = self.moves[-1] or any(bool(one.any()) for one in gradients)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        schedulers = [config.scheduler.last_epoch for config in trainer.lr_scheduler_configs]
        self.clock.append((trainer.global_step, trainer.current_epoch, batch_idx, *schedulers))
        self.weights.append(digest(module.parameters()))
        self._look(trainer, module)
        self.told.append(self._looked)
        # A micro-batch that makes no update may have touched the buffers.
        if trainer.global_step not in self.after:
            self.after[trainer.global_step] = learner(trainer, module)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self._look(trainer, module)  # before stochastic weight averaging puts the average in the module

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self._look(trainer, module)

    def _look(self, trainer: Any, module: Any) -> None:
        made = self.records()
        if len(made) > self._looked:
            self._looked = len(made)
            self._restored(made[-1], learner(trainer, module))

    def _restored(self, record: Any, state: str) -> None:
        remedies, step = record.remedies, record.snapshot_step
        if step is None or "redo" in remedies or "reset moments" in remedies:
            return
        if step not in self.after:
            self.wrong.append(f"a restore goes to step {step}, at which no update ended")
        elif state != self.after[step]:
            self.wrong.append(f"after a restore at step {record.global_step} the state is not that of step {step}")


class LeaveOut(pl.Callback):
    """Keeps batches whose losses are zero from leaving anything else: a run without them.

    Args:
        numbers: Of the batches.
        accumulate: Micro-batches of an update.
    """

    def __init__(self, numbers: tuple[int, ...], accumulate: int) -> None:
        self.numbers, self.accumulate = numbers, accumulate
        self.number = -1
        self.buffers: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.number = int(batch[-1][0])
        if self.number in self.numbers:
            self.buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        window = range(self.number // self.accumulate * self.accumulate, self.number + 1)
        good = [number for number in window if number not in self.numbers]
        if len(good) == len(window):
            return
        for parameter in module.parameters():
            if parameter.grad is not None and good:
                parameter.grad.mul_(len(window) / len(good))
            elif not good:
                parameter.grad = None

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for name, buffer in module.named_buffers():
            if name in self.buffers:
                buffer.copy_(self.buffers[name])
        self.buffers = {}


def digest(tensors: Any) -> str:
    """A hash of the bits of tensors."""
    made = hashlib.blake2b(digest_size=16)
    for one in tensors:
        flat = one.detach().reshape(-1)
        made.update((flat if flat.dtype == torch.uint8 else flat.contiguous().view(torch.uint8)).numpy().tobytes())
    return made.hexdigest()


def _state(optimizers: Sequence[Any]) -> Iterator[Tensor]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                yield from (state[key] for key in sorted(state) if isinstance(state[key], Tensor))


def learner(trainer: Any, module: Any) -> str:
    """A hash of weights, buffers and what the optimizers keep of each weight."""
    return digest([*module.parameters(), *module.buffers(), *_state(trainer.optimizers)])


def not_finite(module: Any, optimizers: Sequence[Any], averages: Sequence[Any]) -> list[str]:
    """Names of what is not finite; masks of −inf are left out."""
    named = dict([*module.named_parameters(), *module.named_buffers()])
    named |= {f"optimizer {index}": one for index, one in enumerate(_state(optimizers))}
    for one in averages:
        named |= {f"average {name}": value for name, value in one._average_model.named_parameters()}
    return [name for name, value in named.items() if not _good(name, value)]


def _good(name: str, value: Tensor) -> bool:
    return name.endswith("mask") or not value.is_floating_point() or bool(torch.isfinite(value).all())


def bad_files(folder: Path) -> list[str]:
    """What checkpoint files hold that is not finite, but for what other callbacks keep in them."""
    found = []
    for path in sorted(folder.rglob("*.ckpt")):
        saved = torch.load(path, weights_only=False, map_location="cpu")
        learned = {name: saved[name] for name in ("state_dict", "optimizer_states")}
        found += [f"{path.name}: {name}" for name, value in tensors("", learned) if not _good(name, value)]
    return found


def tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors within nested containers, with their names."""
    return ((leaf, item) for leaf, item in leaves(name, value) if isinstance(item, Tensor))


def census() -> dict[str, Any]:
    """What of this process a run may change: threads, children, open files, hooks of all modules, patched classes."""
    module, optimizer = torch.nn.modules.module, sys.modules[Optimizer.__module__]
    found: dict[str, Any] = {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "children": len(multiprocessing.active_children()),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
    }
    for name, value in {**vars(module), **vars(optimizer)}.items():
        if name.startswith("_global_") and isinstance(value, Mapping):
            found[name] = len(value)
    if os.path.isdir("/proc/self/fd"):
        found["files"] = len(os.listdir("/proc/self/fd"))
    for one in _CLASSES:
        found |= {f"{one.__name__}.{name}": id(value) for name, value in vars(one).items()}
    return found


_CLASSES: tuple[type, ...] = (
    pl.Trainer,
    pl.LightningModule,
    _FitLoop,
    Optimizer,
    torch.optim.SGD,
    torch.optim.Adam,
    torch.utils.data.DataLoader,
    torch.nn.Module,
)
