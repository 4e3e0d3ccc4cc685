"""What may happen among ranks under any strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from torch.profiler import ProfilerActivity, profile

from lightning_nanguard import NaNGuard
from tests.distributed.data import AT, STEPS, spoilt
from tests.helpers import Task


class NaNMetric(Task):
    """Logs a metric that is NaN on one rank."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        value = float("nan") if self.global_rank == 1 and batch_idx == AT else 1.0
        self.log("metric", torch.tensor(value), sync_dist=True, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


class NaNValidation(Task):
    """Its validation loss is NaN on one rank, once."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().validation_step(batch, batch_idx)
        return loss * float("nan") if self.global_rank == 1 and self.current_epoch == 1 else loss


class CountCollectives(Callback):
    """Counts those of some updates, none of them the first or the last."""

    def __init__(self) -> None:
        self._trace = profile(activities=[ProfilerActivity.CPU])

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self._trace.start()
        if batch_idx == STEPS - 1:
            self._trace.stop()

    def found(self) -> int:
        return sum(event.count for event in self._trace.key_averages() if event.key.startswith("c10d::"))


def further(worker: Any, name: str, fit: Callable[..., Any], made: Callable[..., Task], kind: type[Task]) -> None:
    """Fits under one strategy.

    Args:
        worker: The rank.
        name: Of the strategy, before those of the fits.
        fit: Makes one.
        made: Makes a module of a class.
        kind: A class of modules for the strategy.
    """
    fit("metric", module=made(kind=type("Metric", (NaNMetric, kind), {})))
    fit("validation", module=made(kind=type("Validation", (NaNValidation, kind), {})), max_epochs=3)
    late = NaNGuard(readback="deferred", snapshot_every_n_steps=2)
    fit("deferred samples", data=spoilt(1, 15, 19, 23, 27, count=32), guard=late)
    for guarded in (True, False):
        count, traced = CountCollectives(), "traced" if guarded else "traced bare"
        fit(traced, count, guarded=guarded)
        worker.results[f"{name}{traced}"]["collectives"] = count.found()
