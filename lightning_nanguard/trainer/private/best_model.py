"""The best model of a ModelCheckpoint is never one whose metric is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

_METHODS = ("check_monitor_top_k", "_update_best_and_save", "_save_checkpoint")


def keep_best_finite(trainer: Any) -> Callable[[], None]:
    """Have every ModelCheckpoint take a metric that is not finite for the worst there is, and for no best.

    Lightning stores NaN as the worst value and calls it best while slots are free; −inf stays the best of a minimum for
    good, and drives finite ones out. What was to be saved is still saved: only the ranking is another, and while no
    metric was finite there is no best model.

    Args:
        trainer: The trainer of either Lightning package.

    Returns:
        A function that undoes this.
    """
    undos = [undo for callback in trainer.callbacks if _ranks(callback) for undo in _wrap(callback)]

    def undo() -> None:
        while undos:
            undos.pop()()

    return undo


def _ranks(callback: object) -> bool:
    named = any(cls.__name__ == "ModelCheckpoint" for cls in type(callback).__mro__)
    return named and all(callable(getattr(callback, name, None)) for name in _METHODS)


def _wrap(callback: Any) -> list[Callable[[], None]]:
    check, update, save = (getattr(callback, name) for name in _METHODS)

    @wraps(check)
    def check_monitor_top_k(trainer: Any, current: Any = None) -> Any:
        return check(trainer, _ranked(callback, current))

    @wraps(update)
    def update_best_and_save(current: Any, *args: Any, **kwargs: Any) -> Any:
        return update(_ranked(callback, current), *args, **kwargs)

    @wraps(save)
    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        _forget(callback)  # now, as it goes into the file
        return save(*args, **kwargs)

    _forget(callback)  # what a checkpoint of a run without the guard has brought along
    wrappers: tuple[Callable[..., Any], ...] = (check_monitor_top_k, update_best_and_save, save_checkpoint)
    return [_shadow(callback, name, ours) for name, ours in zip(_METHODS, wrappers, strict=True)]


def _shadow(owner: Any, name: str, ours: Callable[..., Any]) -> Callable[[], None]:
    before = vars(owner).get(name)
    setattr(owner, name, ours)

    def undo() -> None:
        if vars(owner).get(name) is not ours:
            return  # somebody has wrapped it again since
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    return undo


def _worst(callback: Any) -> float:
    return math.inf if callback.mode == "min" else -math.inf


def _ranked(callback: Any, current: Any) -> Any:
    if isinstance(current, Tensor) and not bool(torch.isfinite(current).all()):
        return torch.full_like(current, _worst(callback))
    return current


def _forget(callback: Any) -> None:
    best = callback.best_model_score
    if not isinstance(best, Tensor) or bool(torch.isfinite(best).all()):
        return
    models = {path: _ranked(callback, score) for path, score in callback.best_k_models.items()}
    callback.best_k_models = models
    finite = {path: float(score) for path, score in models.items() if math.isfinite(score)}
    if not finite:
        callback.best_model_path, callback.best_model_score = "", None
        return
    pick = min if callback.mode == "min" else max
    callback.best_model_path = pick(finite, key=lambda path: finite[path])
    callback.best_model_score = models[callback.best_model_path]
