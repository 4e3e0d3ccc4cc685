"""Writes the settings of the guard to the hyperparameters of the trainer's loggers, and to the log of the run."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

from lightning_nanguard.thresholds.records import RecordsThresholds
from lightning_nanguard.trainer.private.packages import LightningModule, Trainer

_logger = logging.getLogger("lightning_nanguard")


def log_settings(trainer: Trainer, settings: Mapping[str, Any]) -> None:
    """Log the settings of the guard as hyperparameters of every logger. An error is logged and does not end the run."""
    if not trainer.is_global_zero:
        return
    named = {f"nanguard/{name}": plain_value(value) for name, value in settings.items()}
    for logger in trainer.loggers:
        log: Callable[..., Any] = logger.log_hyperparams
        # Without this, TensorBoard adds a metric of its own.
        more: dict[str, Any] = {"metrics": {}} if "metrics" in inspect.signature(log).parameters else {}
        try:
            log(named, **more)
        except Exception as error:
            _logger.warning("NaNGuard: %s did not accept the guard's settings: %s", type(logger).__name__, error)


def plain_value(value: Any) -> Any:
    """The value of a setting as a number, a string or ``None``, which every logger and file accepts.

    Args:
        value: The value. An object is replaced by the name of its type.
    """
    if isinstance(value, list):
        return ", ".join(map(str, value))
    # Some loggers refuse objects, or fail when they save them.
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__


def begun_with(
    trainer: Trainer, module: LightningModule, settings: Mapping[str, Any], thresholds: RecordsThresholds
) -> dict[str, dict[str, Any]]:
    """The settings of a fit for the log of the run, so that runs can be compared.

    Args:
        trainer: The trainer.
        module: Its module. Numbers and short strings among its hyperparameters, and among those of the data module, are
            taken.
        settings: The settings of the guard.
        thresholds: How many hyperparameters are taken.
    """
    given: dict[str, Any] = {}
    for source in (module, getattr(trainer, "datamodule", None)):
        saved = getattr(source, "hparams", None)
        if isinstance(saved, Mapping):
            given |= {str(name): saved[name] for name in saved}
    words = thresholds.characters_per_hyperparameter
    short = [(n, v) for n, v in given.items() if isinstance(v, (bool, int, float, str)) and len(str(v)) <= words]
    return {
        "settings": {name: plain_value(value) for name, value in settings.items()},
        "hyperparameters": dict(short[: thresholds.hyperparameters_per_run]),
    }
