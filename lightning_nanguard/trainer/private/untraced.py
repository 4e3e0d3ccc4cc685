"""Runs the user's code outside the run, and undoes everything that it changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from lightning_nanguard.act.patches import call_nothing, wrapped
from lightning_nanguard.state.attributes import attributes_kept
from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.state.random_state import RandomStreams
from lightning_nanguard.thresholds.batches import BatchesThresholds
from lightning_nanguard.trainer.private.clock import clock_kept
from lightning_nanguard.trainer.private.packages import LightningModule, Trainer, package_of
from lightning_nanguard.trainer.private.running_means import remember_running_means
from lightning_nanguard.trainer.private.training_step import compiled_by_lightning

_METRICS = ("_logged_metrics", "_callback_metrics", "_progress_bar_metrics")


@contextmanager
def untraced(
    trainer: Trainer, module: LightningModule, thresholds: BatchesThresholds = BatchesThresholds()
) -> Iterator[None]:
    """Undo at the end everything that a step changes: random streams, buffers, metrics, logged values, attributes.

    Inside, gradients are enabled, and no checkpoint is saved, because the weights may be temporary.

    Args:
        trainer: The trainer.
        module: Its module.
        thresholds: Which objects are copied, and how deep attributes are searched.
    """
    trace = BatchUndo(module, [partial(remember_running_means, trainer)], thorough=True, thresholds=thresholds.repeated)
    trace.open()
    with ExitStack() as last:
        last.callback(trace.undo)
        last.callback(RandomStreams(module.device).now().restore)
        with (
            clock_kept(trainer),
            wrapped(trainer, "save_checkpoint", call_nothing),
            wrapped(trainer.strategy, "save_checkpoint", call_nothing),
            _without_logs(trainer),
            attributes_kept(module, limits=thresholds.repeated),
            torch.enable_grad(),
        ):
            yield


@contextmanager
def unlogged(module: LightningModule) -> Iterator[None]:
    """Inside, ``self.log`` does nothing. This takes a third of the time of a small model's step.

    A class with a ``log`` of its own keeps it, because its step may need it. So does a compiled module, because torch
    would compile its step again.
    """
    own = type(module).log is not package_of(type(module)).LightningModule.log or "log" in vars(module)
    if own or compiled_by_lightning(module):
        yield
        return
    with wrapped(module, "log", call_nothing):
        yield


@contextmanager
def _without_logs(trainer: Any) -> Iterator[None]:
    """Inside, hide the values of ``self.log`` from loggers, callbacks and the progress bar."""
    connector = getattr(trainer, "_logger_connector", None)
    if connector is None:
        yield
        return
    kept = {name: dict(value) for name in _METRICS if isinstance(value := getattr(connector, name, None), dict)}
    try:
        yield
    finally:
        for name, value in kept.items():
            live = getattr(connector, name)
            live.clear()
            live.update(value)
