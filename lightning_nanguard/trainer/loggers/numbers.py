"""A sink that logs the numbers of the guard to the trainer's loggers and its progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import final

from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.record.base import Sink
from lightning_nanguard.record.memory import Memory
from lightning_nanguard.trainer.private.packages import LightningModule, Trainer, logged_at
from lightning_nanguard.types import Intervention


@final
class LoggerNumbers(Sink):
    """Logs the number of interventions, the learning-rate multiplier and the clipping value after each intervention.

    Args:
        trainer: The trainer.
        module: Its module.
        memory: Counts the interventions.
        context: The objects that the parts of the guard share.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, memory: Memory, context: GuardContext) -> None:
        self._trainer = trainer
        self._module = module
        self._memory = memory
        self._context = context
        self._may_show = False
        # Shows a number in the progress bar that has to wait for the end of a batch.
        self._waiting: Callable[[], None] | None = None

    def write(self, intervention: Intervention) -> None:
        """Log the present numbers."""
        count, clip_val = float(self._memory.total), self._context.clipper.value
        values = {"nanguard/interventions": count, "nanguard/lr_multiplier": float(self._context.rate.ratio())}
        if clip_val is not None:
            values["nanguard/clip_val"] = float(clip_val)
        for logger in self._trainer.loggers:
            logger.log_metrics(dict(values), step=logged_at(self._trainer))
        if self._trainer.progress_bar_callback is None:
            return
        show = partial(self._module.log, "nanguard", count, prog_bar=True, logger=False, rank_zero_only=True)
        if self._may_show:
            show()
        else:
            self._waiting = show

    @contextmanager
    def at_batch_end(self) -> Iterator[None]:
        """Wraps the hook at the end of a batch. Only in this hook may the module log."""
        self._may_show = True
        try:
            yield
            if self._waiting is not None:
                self._waiting()
                self._waiting = None
        finally:
            self._may_show = False
