"""Reads the values that Lightning logs after an update, and logs them again for an update that was made again."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from lightning_nanguard.trainer.private.packages import Trainer, logs_every

_logger = logging.getLogger("lightning_nanguard")


@final
@dataclass(frozen=True, slots=True)
class LoggedRow:
    """The values of one update.

    Attributes:
        values: The values that ``training_step`` logged with ``on_step=True``.
        step: The step that the loggers get.
        epoch: The epoch of the update.
    """

    values: dict[str, Any]
    step: int
    epoch: int


def row_of_step(trainer: Trainer, step: int, epoch: int) -> LoggedRow | None:
    """The row of the newest pass through ``training_step``; ``None`` if Lightning does not log at this step."""
    every = logs_every(trainer)
    if every < 1 or (step + 1) % every:
        return None
    results = trainer.fit_loop.epoch_loop._results
    # Values that hooks logged belong to the first pass, because hooks are not called again.
    of_step = type(results)(True)
    of_step.update((key, item) for key, item in results.items() if item.meta.fx == "training_step")
    values = of_step.metrics(True)["log"]
    return LoggedRow(dict(values), step, epoch) if values else None


def log_row(trainer: Trainer, row: LoggedRow) -> None:
    """Give a row to all loggers, at its own step."""
    values = {name: value.item() if isinstance(value, Tensor) else value for name, value in row.values.items()}
    own = values.pop("step", None)  # a value of this name replaces the step
    if own is None:
        values["epoch"] = row.epoch
    for logger in trainer.loggers:
        try:
            logger.log_metrics(metrics=dict(values), step=row.step if own is None else int(own))
            logger.save()
        except Exception as error:
            name, kind = type(logger).__name__, type(error).__name__
            _logger.warning("NaNGuard: %s did not take the row of step %d again: %s: %s", name, row.step, kind, error)
