"""Saves the running means of ``self.log(on_epoch=True)`` before a batch, and restores them after a bad one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

FIELDS = frozenset({"value", "cumulated_batch_size", "_update_count", "has_reset", "_forward_cache"})


def remember_running_means(trainer: Any) -> Callable[[], None]:
    """Save the values that were logged so far in this epoch.

    Returns:
        A function that restores them. Values are updated out of place, so references are enough. A logged torchmetrics
        object is not restored here.
    """
    # The same as Trainer._results in training, but faster, because this runs before every batch.
    results = trainer.fit_loop.epoch_loop._results
    saved = {key: vars(item).copy() for key, item in results.items()}

    def undo() -> None:
        for key, item in results.items():
            before = saved.get(key)
            if before is None:
                if getattr(item, "is_tensor", True):
                    item.reset()
                    item._forward_cache = None
            else:
                vars(item).update({name: before[name] for name in FIELDS & before.keys()})
            item._computed = None

    return undo


def keep_names(trainer: Any) -> None:
    """After a skipped batch: let values that only skipped batches have logged so far be NaN, and not missing.

    A callback or a scheduler that monitors a value raises an exception if its name is missing. Loggers do not get it.
    """
    results, known = trainer.fit_loop.epoch_loop._results, trainer.callback_metrics
    for item in results.values():
        names = {name for on_step in (True, False) for name in results._forked_name(item, on_step)}
        for name in names - known.keys():
            trainer._logger_connector._callback_metrics[name] = torch.tensor(torch.nan, device=item.device)


def running_means(trainer: Any) -> list[Any]:
    """The running means of training: Lightning's own metrics, whose state is in :data:`FIELDS`."""
    return list(trainer.fit_loop.epoch_loop._results.values())
