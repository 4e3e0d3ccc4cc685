"""Runs a fit up to its first batch, without Lightning's own messages, for commands that check a run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pytorch_lightning.callbacks import LambdaCallback

from lightning_nanguard.act.patches import wrapped
from lightning_nanguard.trainer.private.packages import package_of

QUIET = {
    "callbacks": None,
    "devices": 1,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "limit_val_batches": 0,
    "logger": False,
    "num_sanity_val_steps": 0,
}
"""Options of a Trainer that writes, shows and validates nothing."""

OnBatch = Callable[[Any, Any, Any, int], None]


class _FirstBatchSeen(Exception):  # noqa: N818
    """Ends a fit from inside."""


def at_first_batch(trainer: Any, module: Any, on_batch: OnBatch, **data: Any) -> None:
    """Fit up to the first batch, call ``on_batch`` there, and end before the first step.

    Args:
        trainer: A trainer that writes nothing.
        module: The module.
        on_batch: Called with trainer, module, batch and its index, before the first step.
        data: The data argument of ``trainer.fit``: ``datamodule`` or ``train_dataloaders``.
    """

    def call_and_end(*args: Any) -> None:
        on_batch(*args)
        raise _FirstBatchSeen

    callback = LambdaCallback(on_train_batch_start=call_and_end)
    trainer.callbacks = [*trainer.callbacks, callback]
    try:
        trainer.fit(module, **data)
    except _FirstBatchSeen:
        return
    finally:
        trainer.callbacks = [one for one in trainer.callbacks if one is not callback]


class _OneBatch:
    """An iterable with one batch. Lightning would take a list for a list of loaders."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def __iter__(self) -> Iterator[Any]:
        yield self._batch

    def __len__(self) -> int:
        return 1


def one_batch(module: Any, batch: Any, on_batch: OnBatch, *, precision: str = "32-true") -> None:
    """Give a module one batch without the hooks that change batches, and call ``on_batch`` there.

    Args:
        module: The module.
        batch: The batch, as ``training_step`` gets it.
        on_batch: See :func:`at_first_batch`.
        precision: The trainer's.
    """
    trainer = package_of(type(module)).Trainer(
        **{**QUIET, "accelerator": "cpu", "max_epochs": 1, "precision": precision}
    )
    with (
        wrapped(module, "_on_before_batch_transfer", _given_batch),
        wrapped(trainer.strategy, "batch_to_device", _given_batch),
    ):
        at_first_batch(trainer, module, on_batch, train_dataloaders=_OneBatch(batch))


def _given_batch(original: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
    return batch


@contextmanager
def without_messages() -> Iterator[None]:
    """Inside, show none of Lightning's tips and warnings."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
