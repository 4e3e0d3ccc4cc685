"""The guard's place among the other callbacks: ahead of all in most hooks, behind all when a batch is over."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import Any, final

from lightning_nanguard.trainer.private.packages import Callback, is_kind

_TUNERS = ("BatchSizeFinder", "LearningRateFinder")


def put_first(trainer: Any, guard: Any) -> Callable[[], None]:
    """Move the guard ahead of all callbacks but the tuners, so that none sees a state the guard is about to undo.

    The list is replaced rather than changed: Lightning may be walking over it.

    Returns:
        A function that undoes this: the guard goes back behind those it stood behind. All others stay where they are
        then, with those that were added meanwhile.
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
            return  # somebody has taken the guard out
        place = max((index for index, callback in enumerate(others, 1) if id(callback) in ahead), default=0)
        trainer.callbacks = [*others[:place], guard, *others[place:]]

    return undo


def _without(callbacks: list[Any], guard: Any) -> list[Any]:
    return [callback for callback in callbacks if callback is not guard]


def unfreezes(trainer: Any) -> bool:
    """Whether a callback unfreezes parts of the module in the course of the run."""
    return any(is_kind(one, "BaseFinetuning") for one in trainer.callbacks)


def is_from_callback(error: BaseException, listens: Callable[[Any], bool]) -> bool:
    """Whether an exception was raised in a hook of a callback.

    Args:
        error: The exception.
        listens: Says which callback is the guard's, which does not count.
    """
    trace = error.__traceback__
    while trace is not None:
        frame, trace = trace.tb_frame, trace.tb_next
        # Hooks may be plain functions (LambdaCallback), so that their own frames do not say whose they are.
        if frame.f_code.co_name == "_call_callback_hooks" and not listens(frame.f_locals.get("callback")):
            return True
    return False


def after_every_batch(trainer: Any, function: Callable[[], None]) -> Callable[[], None]:
    """Call ``function`` at the end of every training batch, behind all callbacks: an average is then up to date.

    Returns:
        A function that undoes this.
    """
    last = _LastCallback(function)
    trainer.callbacks = [*trainer.callbacks, last]  # replaced: Lightning may be walking over the list

    def undo() -> None:
        trainer.callbacks = [callback for callback in trainer.callbacks if callback is not last]

    return undo


@final
class _LastCallback(Callback):
    """Calls a function when a batch is over for all callbacks before it in the list."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._function()
