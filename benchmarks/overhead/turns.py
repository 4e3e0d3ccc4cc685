"""Trainers that take turns: each in a thread of its own, only one of them moving at a time."""

from __future__ import annotations

import random
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from lightning_nanguard import keeper, ring

from .contenders import Contender
from .models import Workload

# Steps of a turn that are not counted: caches are warm with another model's data.
_WARM = 3
# Steps of the first turn, which is not counted either: optimizers make their state, allocators their pools.
_FIRST = 20


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
    return pl.Trainer(callbacks=callbacks, **{**settings, **options})


@final
class _Turns(Callback):
    """Hands over after so many steps, and takes the time of those that count."""

    def __init__(self, racer: Racer, steps: int, rounds: int) -> None:
        self.racer, self.steps, self.rounds = racer, steps, rounds
        self.starts = 0
        self.since = (0.0, 0.0)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.starts += 1
        if not self.racer.turns:
            if self.starts < _FIRST:
                return
        elif self.starts == _WARM:
            self.since = _now(pl_module.device)
            return
        elif self.starts < _WARM + self.steps:
            return
        else:
            now = _now(pl_module.device)
            self.racer.times.append(tuple((b - a) / self.steps for a, b in zip(self.since, now, strict=True)))
            if len(self.racer.times) == self.rounds:
                raise _EnoughError
        self.starts = 0
        self.racer.hand_over()


class _EnoughError(Exception):
    """Enough was measured."""


@final
class _OwnTime:
    """The guard's clock, which stands still while others have their turn: it sets its snapshots by it."""

    def __init__(self) -> None:
        self.paused = threading.local()

    def perf_counter(self) -> float:
        return time.perf_counter() - getattr(self.paused, "seconds", 0.0)

    def pause(self, seconds: float) -> None:
        self.paused.seconds = getattr(self.paused, "seconds", 0.0) + seconds


_OWN = _OwnTime()


def _now(device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.thread_time()


@final
class Racer:
    """One contender on one workload.

    Attributes:
        times: Seconds a step of each turn that counts: wall time, and time of its own thread.
        trainer: The trainer, once it was made.
    """

    def __init__(self, contender: Contender, workload: Workload, folder: Path, device: str) -> None:
        self.contender = contender
        self.times: list[tuple[float, ...]] = []
        self.turns = 0
        self.error: str | None = None
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(workload, folder, device), daemon=True)

    @property
    def alive(self) -> bool:
        """Whether it has something left to do."""
        return self._thread.is_alive()

    def turn(self) -> None:
        """Let it move until it hands over or ends."""
        if not self.turns and not self._thread.is_alive():
            self._thread.start()
        torch.autograd.set_detect_anomaly(self.contender.anomaly)
        self._mine.release()
        self._theirs.acquire()
        torch.autograd.set_detect_anomaly(False)
        self.turns += 1
        if self.error is not None:
            raise RuntimeError(f"{self.contender.title} failed:\n{self.error}")

    def hand_over(self) -> None:
        """Called from its own thread."""
        since = time.perf_counter()
        self._theirs.release()
        self._mine.acquire()
        _OWN.pause(time.perf_counter() - since)

    def _run(self, workload: Workload, folder: Path, device: str) -> None:
        self._mine.acquire()
        try:
            torch.manual_seed(0)
            module = workload.make()
            callbacks = [*self.contender.callbacks(folder), _Turns(self, workload.steps, workload.rounds)]
            options = {"precision": workload.precision, **self.contender.options}
            trainer = quiet_trainer(folder, callbacks, device, **options)
            trainer.fit(module, workload.loader(100))
        except _EnoughError:
            pass
        except BaseException:
            self.error = traceback.format_exc()
        finally:
            self._theirs.release()


def race(contenders: Mapping[str, Contender], workload: Workload, folder: Path, device: str) -> dict[str, Racer]:
    """Let all of them run through all rounds, in another order each time."""
    ring.time = keeper.time = _OWN  # type: ignore[attr-defined, assignment]
    racers = {name: Racer(contender, workload, folder, device) for name, contender in contenders.items()}
    order = list(racers.values())
    shuffle = random.Random(0).shuffle
    while any(len(racer.times) < workload.rounds for racer in order):
        shuffle(order)
        for racer in order:
            racer.turn()
    return racers
