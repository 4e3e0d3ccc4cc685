"""Orders the callbacks: the guard comes first in most hooks, and last at the end of a batch.

LearningRateMonitor logs the effective learning rate instead of the scheduled one in the groups.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import Any

from pytorch_lightning.callbacks import LambdaCallback

from lightning_nanguard.act.patches import undo_all, wrap_method
from lightning_nanguard.trainer.private.packages import is_kind

IsGuard = Callable[[Any], bool]
"""Says whether a callback is the guard."""
_TUNERS = ("BatchSizeFinder", "LearningRateFinder")


def put_first(trainer: Any, guard: Any) -> Callable[[], None]:
    """Move the guard before all callbacks except tuners, so that none sees a state that the guard will undo.

    The list is replaced and not changed, because Lightning may be iterating over it.

    Returns:
        A function that undoes this: it moves the guard back behind the callbacks that were before it. The order of the
            other callbacks does not change.
    """
    ahead = {id(callback) for callback in takewhile(lambda one: one is not guard, trainer.callbacks)}
    others = _without(trainer.callbacks, guard)
    split = 0
    while split < len(others) and is_kind(others[split], *_TUNERS):
        split += 1
    trainer.callbacks = [*others[:split], guard, *others[split:]]

    def undo() -> None:
        others = _without(trainer.callbacks, guard)
        if len(others) == len(trainer.callbacks):
            return  # somebody has removed the guard
        place = max((index for index, callback in enumerate(others, 1) if id(callback) in ahead), default=0)
        trainer.callbacks = [*others[:place], guard, *others[place:]]

    return undo


def _without(callbacks: list[Any], guard: Any) -> list[Any]:
    return [callback for callback in callbacks if callback is not guard]


def unfreezes(trainer: Any) -> bool:
    """Whether a callback unfreezes parts of the module during the run."""
    return any(is_kind(one, "BaseFinetuning") for one in trainer.callbacks)


def is_from_callback(error: BaseException, is_guard: IsGuard) -> bool:
    """Whether an exception was raised in a hook of a callback.

    Args:
        error: The exception.
        is_guard: Says whether a callback is the guard, which does not count.
    """
    trace = error.__traceback__
    while trace is not None:
        frame, trace = trace.tb_frame, trace.tb_next
        # The caller's frame names the callback. The hook's own frame may not, as with LambdaCallback.
        if frame.f_code.co_name == "_call_callback_hooks" and not is_guard(frame.f_locals.get("callback")):
            return True
    return False


def after_every_batch(trainer: Any, function: Callable[[], None]) -> Callable[[], None]:
    """Call ``function`` at the end of every training batch, after all callbacks, when averages are up to date.

    Returns:
        A function that undoes this.
    """
    last = LambdaCallback(on_train_batch_end=lambda *args: function())
    trainer.callbacks = [*trainer.callbacks, last]  # replaced: Lightning may be iterating over the list

    def undo() -> None:
        trainer.callbacks = [callback for callback in trainer.callbacks if callback is not last]

    return undo


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
