"""Fits that the suites of FSDP and DeepSpeed (`sharding.py`, `zero.py`) run alike, and what counts collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from torch.profiler import ProfilerActivity, profile

from lightning_nanguard import NaNGuard
from tests.distributed.data import AT, STEPS, spoilt
from tests.helpers import Task


class NaNRate(Callback):
    """The learning rate of one rank becomes NaN before a batch.

    Args:
        at: The batch.
        lasts: Number of batches after which it is as before.
    """

    def __init__(self, at: int, lasts: int = 1000) -> None:
        self.at, self.lasts = at, lasts
        self.before = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        group = trainer.optimizers[0].param_groups[0]
        if trainer.global_rank == 1 and batch_idx == self.at:
            self.before, group["lr"] = group["lr"], float("nan")
        elif trainer.global_rank == 1 and batch_idx == self.at + self.lasts:
            group["lr"] = self.before


class NaNMetric(Task):
    """Logs a metric, reduced over ranks, that is NaN on one rank."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        value = float("nan") if self.global_rank == 1 and batch_idx == AT else 1.0
        self.log("metric", torch.tensor(value), sync_dist=True, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


class NaNValidation(NaNMetric):
    """Also its validation loss is NaN on one rank, in one epoch."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().validation_step(batch, batch_idx)
        return loss * float("nan") if self.global_rank == 1 and self.current_epoch == 1 else loss


class CountCollectives(Callback):
    """Counts the collectives of some updates, none of them the first or the last."""

    def __init__(self) -> None:
        self._trace = profile(activities=[ProfilerActivity.CPU])

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self._trace.start()
        if batch_idx == STEPS - 1:
            self._trace.stop()

    def found(self) -> int:
        return collectives_in(self._trace)


def collectives_in(trace: profile) -> int:
    """Number of collectives in a trace."""
    # The events themselves: what `key_averages` makes of them takes seconds.
    return sum(event.name().startswith("c10d::") for event in trace.profiler.kineto_results.events())  # type: ignore[union-attr]


def further(fit: Callable[..., Any], made: Callable[..., Task], kind: type[Task]) -> None:
    """Faults outside a step, and faults that are read late.

    Args:
        fit: Makes one fit.
        made: Makes a module of a class.
        kind: A class of modules for the strategy.
    """
    fit("validation", module=made(kind=type("Validation", (NaNValidation, kind), {})), max_epochs=3)
    late = NaNGuard(readback="deferred", snapshot_every_n_steps=2)
    fit("deferred samples", data=spoilt(1, 15, 19, 23, 27, count=32), guard=late)


def healthy(worker: Any, name: str, fit: Callable[..., Any]) -> None:
    """A fit without a fault, with the guard and without, and the collectives of both.

    Args:
        worker: The rank.
        name: Of the strategy, before those of the fits.
        fit: Makes one fit.
    """
    for one, guarded in (("healthy", True), ("bare", False)):
        count = CountCollectives()
        fit(one, count, guarded=guarded)
        worker.results[f"{name}{one}"]["collectives"] = count.found()
