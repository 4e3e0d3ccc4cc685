"""LearningRateMonitor logs the effective learning rate, not the scheduled one that the groups hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_nanguard.trainer.private.packages import is_kind
from lightning_nanguard.trainer.private.patches import undo_all, wrap_method

# The hooks in which a LearningRateMonitor reads the groups.
_HOOKS = ("on_train_epoch_start", "on_train_batch_start")


def around_learning_rate_monitors(
    trainer: Any, before: Callable[[], None], after: Callable[[], None]
) -> Callable[[], None]:
    """Call ``before`` and ``after`` around each moment at which a LearningRateMonitor reads the learning rates.

    Scaling the rates for all callbacks at once would be simpler and wrong: BackboneFinetuning computes the rate of the
    group it adds from the one it reads in the same hook, and so may a user's own callback.

    Args:
        trainer: The trainer of either Lightning package; its callbacks must be complete (from ``on_fit_start`` on).
        before: Called before the monitor reads.
        after: Called after it, also if it raises.

    Returns:
        A function that undoes this; calling it again does nothing.
    """

    def surround(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before()
        try:
            return original(*args, **kwargs)
        finally:
            after()

    return undo_all(
        [
            wrap_method(callback, name, surround)
            for callback in trainer.callbacks
            if is_kind(callback, "LearningRateMonitor")
            for name in _HOOKS
        ]
    )
