"""The clock of a run, and the clock that ``training_step`` sees in a repeated pass: that of its own step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_nanguard.diagnosis.isolation import errors_logged


def expected_updates(trainer: Any) -> float:
    """Number of updates in the whole run; ``math.inf`` if it is not known or not limited."""
    with errors_logged("the length of the run is not known"):
        known = float(trainer.estimated_stepping_batches)
        return known if known >= 0 else math.inf  # Lightning gives -1 if the data have no length
    return math.inf


@contextmanager
def clock_kept(trainer: Any) -> Iterator[None]:
    """Inside, the clock may be set. It is restored at the end."""
    steps, epochs = _counters(trainer)
    before = steps.completed, epochs.completed
    try:
        yield
    finally:
        steps.completed, epochs.completed = before


def set_clock(trainer: Any, global_step: int, epoch: int) -> None:
    """Set what ``global_step`` and ``current_epoch`` of the trainer and its module return.

    Args:
        trainer: The trainer, under automatic optimization.
        global_step: Number of steps before the step that is repeated.
        epoch: Its epoch.
    """
    steps, epochs = _counters(trainer)
    steps.completed, epochs.completed = global_step, epoch


def _counters(trainer: Any) -> tuple[Any, Any]:
    loop = trainer.fit_loop
    return loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total, loop.epoch_progress.current
