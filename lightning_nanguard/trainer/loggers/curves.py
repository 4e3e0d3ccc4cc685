"""Gives the trainer's loggers the curves of the guard."""

from __future__ import annotations

import logging
import math
from typing import final

from lightning_nanguard.trainer.private.packages import Trainer, logged_at, logs_every
from lightning_nanguard.types import Reading

_logger = logging.getLogger("lightning_nanguard")


@final
class LoggerCurves:
    """Logs gradient norm and effective learning rate every ``log_every_n_steps``, at Lightning's own logging step."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._every = logs_every(trainer)

    def take(self, reading: Reading, lr: float | None) -> None:
        """Log the reading of an update, if Lightning logs at this step."""
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
                    "NaNGuard: %s did not accept %s, and gets no more of these curves: %s",
                    type(logger).__name__,
                    ", ".join(finite),
                    error,
                )
