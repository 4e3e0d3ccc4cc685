"""The running means behind ``self.log(on_epoch=True)``: remembered before a batch, put back after a bad one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FIELDS = frozenset({"value", "cumulated_batch_size", "_update_count", "has_reset", "_forward_cache"})


def remember_running_means(trainer: Any) -> Callable[[], None]:
    """Remember what was logged so far in this epoch.

    Returns:
        A function that puts it back. Values are updated out of place, so references suffice; a torchmetrics object
        that was logged is left to whoever undoes metrics.
    """
    # What Trainer._results leads to in training, by the short way: this runs before every batch.
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


def running_means(trainer: Any) -> list[Any]:
    """The running means of training: metrics of Lightning's own, whose state is in :data:`FIELDS`."""
    return list(trainer.fit_loop.epoch_loop._results.values())
