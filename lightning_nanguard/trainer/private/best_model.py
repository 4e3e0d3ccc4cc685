"""ModelCheckpoint never takes a model for the best one whose metric is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_nanguard.trainer.private.packages import is_kind
from lightning_nanguard.trainer.private.patches import undo_all, wrap_method


def keep_best_finite(trainer: Any) -> Callable[[], None]:
    """Have every ModelCheckpoint take a metric that is not finite for the worst there is, and for no best.

    Lightning stores NaN as the worst value, and calls it best while slots are free; −inf stays the best of a minimum
    for good, and drives finite ones out. The same files are saved as without this: only the ranking differs, and while
    no metric was finite there is no best model.

    Args:
        trainer: The trainer of either Lightning package.

    Returns:
        A function that undoes this; calling it again does nothing.
    """
    undos = []
    for callback in trainer.callbacks:
        if all(callable(getattr(callback, name, None)) for name in _WRAPPERS) and is_kind(callback, "ModelCheckpoint"):
            _forget_best(callback)  # a checkpoint of a run without the guard may have brought it along
            undos += [wrap_method(callback, name, partial(wrapper, callback)) for name, wrapper in _WRAPPERS.items()]
    return undo_all(undos)


def _check_monitor_top_k(callback: Any, check: Callable[..., Any], trainer: Any, current: Any = None) -> Any:
    return check(trainer, _ranked(callback, current))


def _update_best_and_save(callback: Any, update: Callable[..., Any], current: Any, *args: Any, **kwargs: Any) -> Any:
    return update(_ranked(callback, current), *args, **kwargs)


def _save_checkpoint(callback: Any, save: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    _forget_best(callback)  # before it goes into the file
    return save(*args, **kwargs)


_WRAPPERS: dict[str, Callable[..., Any]] = {
    "check_monitor_top_k": _check_monitor_top_k,
    "_update_best_and_save": _update_best_and_save,
    "_save_checkpoint": _save_checkpoint,
}


def _ranked(callback: Any, current: Any) -> Any:
    """The metric, or the worst there is in its place where it is not finite."""
    if isinstance(current, Tensor) and not bool(torch.isfinite(current).all()):
        return torch.full_like(current, math.inf if callback.mode == "min" else -math.inf)
    return current


def _forget_best(callback: Any) -> None:
    """Choose the best model again where the metric of the one chosen is not finite."""
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
