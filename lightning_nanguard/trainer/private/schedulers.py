"""Lets LearningRateMonitor see the effective learning rate."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

__all__ = ["around_learning_rate_monitors"]

# The hooks in which a LearningRateMonitor reads the groups.
_HOOKS = ("on_train_epoch_start", "on_train_batch_start")


def around_learning_rate_monitors(
    trainer: Any, before: Callable[[], None], after: Callable[[], None]
) -> Callable[[], None]:
    """Calls ``before`` and ``after`` around each moment at which a LearningRateMonitor reads the learning rates.

    Scaling the rates for all callbacks at once would be simpler and wrong: BackboneFinetuning computes the rate of the
    group it adds from the one it reads in the same hook, and so may a user's own callback.

    Args:
        trainer: The trainer of either Lightning package; its callbacks must be complete (from ``on_fit_start`` on).
        before: Called before the monitor reads.
        after: Called after it, also if it raises.

    Returns:
        A function that undoes this; calling it again does nothing.
    """
    undos = [
        _surround(callback, name, before, after)
        for callback in trainer.callbacks
        if _is_monitor(callback)
        for name in _HOOKS
    ]

    def undo() -> None:
        while undos:
            undos.pop()()

    return undo


def _is_monitor(callback: object) -> bool:
    # By name, as `lightning` and `pytorch_lightning` each have a class of their own and importing both is slow.
    return any(cls.__name__ == "LearningRateMonitor" for cls in type(callback).__mro__)


def _surround(owner: Any, name: str, before: Callable[[], None], after: Callable[[], None]) -> Callable[[], None]:
    original: Callable[..., Any] = getattr(owner, name)
    shadowed = vars(owner).get(name)
    active = True

    @wraps(original)
    def surrounded(*args: Any, **kwargs: Any) -> Any:
        if not active:
            return original(*args, **kwargs)
        before()
        try:
            return original(*args, **kwargs)
        finally:
            after()

    def undo() -> None:
        nonlocal active
        active = False
        if vars(owner).get(name) is not surrounded:
            return  # somebody has wrapped it again since; from now on ours passes through
        if shadowed is None:
            delattr(owner, name)
        else:
            setattr(owner, name, shadowed)

    setattr(owner, name, surrounded)
    return undo
