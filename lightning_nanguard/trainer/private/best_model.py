"""Keeps ModelCheckpoint from choosing a best model whose metric is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_nanguard.act.patches import undo_all, wrap_method
from lightning_nanguard.trainer.private.packages import is_kind


def keep_best_finite(trainer: Any) -> Callable[[], None]:
    """Make every ModelCheckpoint rank a metric that is not finite as the worst, and never as the best.

    Lightning stores NaN as the worst value, but calls it best while slots are free. With ``mode="min"``, −inf stays the
    best forever, and replaces finite ones. The same files are saved as without this function: only the ranking differs.
    While no metric was finite, there is no best model.

    Args:
        trainer: The trainer of either Lightning package.

    Returns:
        A function that undoes this; calling it again does nothing.
    """
    undos = []
    for callback in trainer.callbacks:
        if all(callable(getattr(callback, name, None)) for name in _WRAPPERS) and is_kind(callback, "ModelCheckpoint"):
            _forget_best(callback)  # loaded from a checkpoint without the guard
            undos += [wrap_method(callback, name, partial(wrapper, callback)) for name, wrapper in _WRAPPERS.items()]
    return undo_all(undos)


def _check_monitor_top_k(callback: Any, check: Callable[..., Any], trainer: Any, current: Any = None) -> Any:
    return check(trainer, _ranked(callback, current))


def _update_best_and_save(callback: Any, update: Callable[..., Any], current: Any, *args: Any, **kwargs: Any) -> Any:
    return update(_ranked(callback, current), *args, **kwargs)


def _save_checkpoint(callback: Any, save: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    _forget_best(callback)  # before it is written to the file
    return save(*args, **kwargs)


_WRAPPERS: dict[str, Callable[..., Any]] = {
    "check_monitor_top_k": _check_monitor_top_k,
    "_update_best_and_save": _update_best_and_save,
    "_save_checkpoint": _save_checkpoint,
}


def _ranked(callback: Any, current: Any) -> Any:
    """The metric, or the worst possible value if it is not finite."""
    if isinstance(current, Tensor) and not bool(torch.isfinite(current).all()):
        return torch.full_like(current, math.inf if callback.mode == "min" else -math.inf)
    return current


def _forget_best(callback: Any) -> None:
    """Choose another best model if the metric of the present one is not finite."""
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
