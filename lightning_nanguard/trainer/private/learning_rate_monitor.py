"""Makes LearningRateMonitor log the effective learning rate instead of the scheduled one in the groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_nanguard.act.patches import undo_all, wrap_method
from lightning_nanguard.trainer.private.packages import is_kind

# The hooks in which a LearningRateMonitor reads the groups.
_HOOKS = ("on_train_epoch_start", "on_train_batch_start")


def around_learning_rate_monitors(
    trainer: Any, before: Callable[[], None], after: Callable[[], None]
) -> Callable[[], None]:
    """Call ``before`` and ``after`` around each moment at which a LearningRateMonitor reads the learning rates.

    Other callbacks must not see scaled rates. For example, in the same hook BackboneFinetuning computes the rate of a
    new group from the rate that it reads.

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
