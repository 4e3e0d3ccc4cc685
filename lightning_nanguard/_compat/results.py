"""The running means behind ``self.log(on_epoch=True)``, remembered before a batch and put back after a bad one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_FIELDS = {"value", "cumulated_batch_size", "_update_count", "has_reset", "_forward_cache"}


def remember_running_means(trainer: Any) -> Callable[[], None]:
    """Remember what was logged so far in this epoch.

    Returns:
        A function that puts it back. Values are updated out of place, so references suffice; a torchmetrics object
        that was logged is left to whoever undoes metrics.
    """
    results = getattr(trainer, "_results", None)
    if results is None:
        return _nothing
    saved = {
        key: {name: value for name, value in vars(item).items() if name in _FIELDS} for key, item in results.items()
    }

    def undo() -> None:
        for key, item in results.items():
            before = saved.get(key)
            if before is None:
                if getattr(item, "is_tensor", True):
                    item.reset()
                    item._forward_cache = None
            else:
                vars(item).update(before)
            item._computed = None

    return undo


def _nothing() -> None:
    return None
