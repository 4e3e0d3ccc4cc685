"""Gives the trainer's loggers the curves of the guard, the words of interventions and the settings."""

from __future__ import annotations

import inspect
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, final

from lightning_nanguard.record.base import Sink
from lightning_nanguard.record.messages import tell, tell_again
from lightning_nanguard.trainer.private.packages import Trainer, logged_at, logs_every
from lightning_nanguard.types import Intervention, Reading

_logger = logging.getLogger("lightning_nanguard")


@final
class LoggerCurves:
    """Logs gradient norm and effective learning rate each ``log_every_n_steps``, at the step of Lightning's own values.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._every = logs_every(trainer)

    def take(self, reading: Reading, lr: float | None) -> None:
        """Log the reading of an update, where Lightning logs, too."""
        if self._every < 1 or ((step := logged_at(self._trainer)) + 1) % self._every:
            return
        suffix = f"_{reading.optimizer_index}" if reading.optimizer_index else ""
        values = {f"nanguard/grad_norm{suffix}": reading.grad_norm, f"nanguard/lr{suffix}": lr}
        finite = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        for logger in self._trainer.loggers if finite else ():
            try:
                logger.log_metrics(dict(finite), step=step)
            except Exception as error:
                self._every = 0
                _logger.warning(
                    "NaNGuard: %s did not take %s, and gets no more of these curves: %s",
                    type(logger).__name__,
                    ", ".join(finite),
                    error,
                )


@final
class LoggerWords(Sink):
    """Gives loggers that have text the words of interventions: the 1st, 2nd, 4th, 8th … of each kind.

    TensorBoard shows them under Text, W&B as a table; other loggers have none.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._seen: Counter[tuple[str, str | None, tuple[str, ...]]] = Counter()
        self._rows: list[list[Any]] = []

    def write(self, intervention: Intervention) -> None:
        """Log the words, or count them."""
        kind = (intervention.fault, intervention.cause, intervention.remedies)
        self._seen[kind] += 1
        seen = self._seen[kind]
        if seen & (seen - 1):
            return
        words = tell(intervention) if seen == 1 else f"{tell_again(intervention)} ({seen:,} so far)"
        step = logged_at(self._trainer)
        self._rows.append([step, words])
        loggers: list[Any] = self._trainer.loggers
        for logger in loggers:
            if hasattr(logger, "log_text"):  # W&B replaces a table by what it is given
                rows = [list(row) for row in self._rows]
                logger.log_text("nanguard/interventions_told", columns=["step", "what"], data=rows, step=step)
            elif hasattr(getattr(logger, "experiment", None), "add_text"):
                # TensorBoard takes Markdown: as code nothing in it is markup.
                code = "\n".join(f"    {line}" for line in words.split("\n"))
                logger.experiment.add_text("nanguard/interventions", code, step)


def log_settings(trainer: Trainer, settings: Mapping[str, Any]) -> None:
    """Put the settings of the guard among the hyperparameters of every logger; what fails is said, and costs no run.

    Args:
        trainer: The trainer.
        settings: The settings by name.
    """
    if not trainer.is_global_zero:
        return
    named = {f"nanguard/{name}": _as_hyperparameter(value) for name, value in settings.items()}
    for logger in trainer.loggers:
        log: Callable[..., Any] = logger.log_hyperparams
        # TensorBoard would add a metric of its own to a run that has none.
        more: dict[str, Any] = {"metrics": {}} if "metrics" in inspect.signature(log).parameters else {}
        try:
            log(named, **more)
        except Exception as error:
            _logger.warning("NaNGuard: %s did not take the guard's settings: %s", type(logger).__name__, error)


def _as_hyperparameter(value: Any) -> Any:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    # Some loggers refuse objects, or fail when they save them.
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__
