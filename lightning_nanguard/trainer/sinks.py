"""Builds the sinks and the advice log of one fit, and logs the numbers of the guard in the trainer's loggers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import final

from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.record.advice import AdviceLog
from lightning_nanguard.record.base import RunInfo, Sink
from lightning_nanguard.record.console import Console
from lightning_nanguard.record.dispatch import SinkDispatcher
from lightning_nanguard.record.files import ADVICE_FILE, RECORDS_FILE
from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.record.layer_norms import LAYER_NORMS_FILE, LayerNormsFile
from lightning_nanguard.record.loggers import Loggers, RunNumbers
from lightning_nanguard.record.memory import Memory
from lightning_nanguard.record.outcome_log import OutcomeLog
from lightning_nanguard.record.receipts import RECEIPTS_FILE, Receipt
from lightning_nanguard.record.trials import TRIALS_FILE, HeldTrial
from lightning_nanguard.thresholds.records import RECORDS, RecordsThresholds
from lightning_nanguard.trainer.loggers.words import LoggerWords
from lightning_nanguard.trainer.private.packages import LightningModule, Trainer, logged_at


def fit_sinks(
    trainer: Trainer,
    run: RunInfo,
    memory: Memory,
    own: Sequence[Sink],
    context: GuardContext,
    metrics: TrainerMetrics,
) -> SinkDispatcher:
    """All sinks of a fit: memory and file first, the user's own sinks last.

    Args:
        trainer: The trainer.
        run: Facts about the fit for sinks.
        memory: Keeps interventions from one fit to the next.
        own: The user's sinks.
        context: The objects that the parts of the guard share.
        metrics: Logs the numbers of the run.
    """
    thresholds = context.thresholds.records
    sinks = [
        memory,
        JsonLines(run.dirpath / RECORDS_FILE, thresholds),
        Console(thresholds),
        Loggers(metrics.numbers, metrics.log),
        LoggerWords(trainer),
        LayerNormsFile(
            run.dirpath / LAYER_NORMS_FILE, partial(context.norms.read, context.learner.named_sizes), thresholds
        ),
    ]
    return SinkDispatcher([*sinks, *own], run, thresholds)


def fit_advice(run: RunInfo, thresholds: RecordsThresholds = RECORDS) -> AdviceLog:
    """The advice log of a fit; on other ranks than 0 it neither writes nor shows advice.

    Args:
        run: Facts about the fit.
        thresholds: How much advice is taken.
    """
    sink = JsonLines(run.dirpath / ADVICE_FILE, thresholds) if run.rank == 0 else None
    return AdviceLog(sink, thresholds, run.run_id)


def fit_outcomes(run: RunInfo, thresholds: RecordsThresholds) -> tuple[OutcomeLog[Receipt], OutcomeLog[HeldTrial]]:
    """The logs of receipts and trials of a fit; on other ranks than 0 they keep them in memory only.

    Args:
        run: Facts about the fit.
        thresholds: How many records wait in memory while the file cannot be written.
    """
    receipts, trials = (
        JsonLines(run.dirpath / name, thresholds, warns=False) if run.rank == 0 else None
        for name in (RECEIPTS_FILE, TRIALS_FILE)
    )
    return OutcomeLog(receipts, run.run_id), OutcomeLog(trials, run.run_id)


@final
class TrainerMetrics:
    """Logs the numbers of the run to every logger of the trainer and to its progress bar.

    Args:
        trainer: The trainer.
        module: Its module.
        memory: Counts interventions.
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

    def numbers(self) -> RunNumbers:
        """The present numbers."""
        return RunNumbers(self._memory.total, self._context.rate.ratio(), self._context.clipper.value)

    def log(self, values: Mapping[str, float]) -> None:
        """Log some numbers by name."""
        for logger in self._trainer.loggers:
            logger.log_metrics(dict(values), step=logged_at(self._trainer))
        if self._trainer.progress_bar_callback is None:
            return
        count = values["nanguard/interventions"]
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
