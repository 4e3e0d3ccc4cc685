"""Runs in which something is on and off by turns.

Two runs of the very same thing differ by one to two per cent here, wherever their tensors happen to lie: what costs
less than that shows only within one run.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, final
from unittest.mock import patch

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from lightning_nanguard.guard.context import Settings
from lightning_nanguard.trainer import context as trainer_context

from .contenders import Contender
from .models import Workload

Times = list[tuple[tuple[float, float], tuple[float, float]]]
"""Of each round, seconds a step without it and with it: wall time, and time of the thread."""

# Steps of a half turn that are not counted: caches are warm with the other half's.
_WARM = 2
# Steps before the first turn, with everything on: optimizers make their state, allocators their pools, detectors wait
# for their first readings.
_FIRST = 40


def quiet_trainer(folder: Path, callbacks: list[Callback], device: str, **options: Any) -> pl.Trainer:
    """A real Trainer that writes nothing."""
    settings: dict[str, Any] = {
        "accelerator": "gpu" if device == "cuda" else "cpu",
        "devices": 1,
        "default_root_dir": folder,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
        "max_epochs": -1,
    }
    trainer = pl.Trainer(callbacks=callbacks, **{**settings, **options})
    if device == "cuda":
        # It would move everything to the host, which takes longer than most of what is measured.
        trainer.strategy.teardown = _nothing  # type: ignore[method-assign]
    return trainer


def make_on(device: str, workload: Workload) -> pl.LightningModule:
    """The workload's module, the same each time, made where it is trained; what was there before is let go of."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    torch.manual_seed(0)
    with torch.device(device):
        return workload.make()


def _nothing() -> None:
    pass


@final
class _OwnTime:
    """The guard's clock, which stands still while it is off: it sets its snapshots by it."""

    def __init__(self) -> None:
        self.paused = 0.0

    def __call__(self) -> float:
        return time.perf_counter() - self.paused


@final
class _Turns(Callback):
    """Switches on and off at the end of steps, behind all other callbacks, and takes the time between."""

    def __init__(self, contender: Contender, callbacks: list[Callback], steps: int, rounds: int) -> None:
        self.times: Times = []
        self._contender, self._callbacks = contender, callbacks
        self._steps, self._rounds = steps, rounds
        self.clock = _OwnTime()
        self._course = self._go()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._trainer, self._device = trainer, pl_module.device
        self._with = list(trainer.callbacks)
        self._without = [callback for callback in trainer.callbacks if callback not in self._callbacks]
        next(self._course)

    def on_train_batch_end(self, *args: Any) -> None:
        if next(self._course, None) is None:
            self._trainer.should_stop = True

    def on_exception(self, *args: Any) -> None:
        self._end()

    def on_train_end(self, *args: Any) -> None:
        self._end()

    def _end(self) -> None:
        torch.autograd.set_detect_anomaly(False)

    def _go(self) -> Iterator[bool]:
        # Goes on at the end of each step.
        self._switch(True)
        yield from [True] * _FIRST
        first = random.Random(0)
        for _ in range(self._rounds):
            measured: dict[bool, tuple[float, float]] = {}
            begins = first.random() < 0.5
            for on in (begins, not begins):
                self._switch(on)
                since = time.perf_counter()
                yield from [True] * _WARM
                start = self._now()
                yield from [True] * self._steps
                end = self._now()
                measured[on] = (end[0] - start[0]) / self._steps, (end[1] - start[1]) / self._steps
                self.clock.paused += 0.0 if on else time.perf_counter() - since
            self.times.append((measured[False], measured[True]))
        self._switch(True)

    def _switch(self, on: bool) -> None:
        # A new list: Lightning is walking over the old one.
        self._trainer.callbacks = list(self._with if on else self._without)  # type: ignore[attr-defined]
        self._contender.switch(self._trainer, self._callbacks, on)
        torch.autograd.set_detect_anomaly(on and self._contender.anomaly)

    def _now(self) -> tuple[float, float]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter(), time.thread_time()


def take_turns(
    contender: Contender,
    workload: Workload,
    folder: Path,
    device: str,
    others: Sequence[Callback] = (),
    *,
    passes: int = 1,
) -> Times:
    """Let a contender be on and off by turns in one run; the times of each round.

    Args:
        contender: What is measured.
        workload: What is trained.
        folder: Where a callback may write.
        device: ``"cpu"`` or ``"cuda"``.
        others: Callbacks that are there all the time.
        passes: Into how many runs the rounds are divided, of which this is one.

    Raises:
        RuntimeError: When the run fails.
    """
    module = make_on(device, workload)
    callbacks = contender.callbacks(folder)
    turns = _Turns(contender, callbacks, workload.steps, max(1, workload.rounds_of(contender.matters) // passes))
    options = {"precision": workload.precision, **contender.options}
    try:
        with patch.object(trainer_context, "Settings", partial(Settings, clock=turns.clock)):
            quiet_trainer(folder, [*callbacks, *others, turns], device, **options).fit(module, workload.loader(100))
    except Exception as error:
        raise RuntimeError(f"{contender.title} failed on {workload.title}: {error!r}") from error
    return turns.times
