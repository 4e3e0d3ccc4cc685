"""Builds the sinks and the advice log of one fit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.record.base import RunInfo, Sink
from lightning_nanguard.record.console import Console
from lightning_nanguard.record.dispatch import SinkDispatcher
from lightning_nanguard.record.files import ADVICE_FILE, RECORDS_FILE
from lightning_nanguard.record.fit_log import FitLog
from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.record.layer_norms import LAYER_NORMS_FILE, LayerNormsFile
from lightning_nanguard.record.memory import Memory
from lightning_nanguard.record.messages import describe_advice
from lightning_nanguard.record.receipts import RECEIPTS_FILE, Receipt
from lightning_nanguard.record.trials import TRIALS_FILE, HeldTrial
from lightning_nanguard.thresholds.records import RECORDS, RecordsThresholds
from lightning_nanguard.trainer.loggers import LoggerNumbers, LoggerWords
from lightning_nanguard.trainer.private.packages import Trainer
from lightning_nanguard.types import Advice


def fit_sinks(
    trainer: Trainer,
    run: RunInfo,
    memory: Memory,
    own: Sequence[Sink],
    context: GuardContext,
    numbers: LoggerNumbers,
) -> SinkDispatcher:
    """All sinks of a fit: memory and file first, the user's own sinks last.

    Args:
        trainer: The trainer.
        run: Facts about the fit for sinks.
        memory: Keeps interventions from one fit to the next.
        own: The user's sinks.
        context: The objects that the parts of the guard share.
        numbers: Logs the numbers of the run.
    """
    thresholds = context.thresholds.records
    sinks = [
        memory,
        JsonLines(run.dirpath / RECORDS_FILE, thresholds),
        Console(thresholds),
        numbers,
        LoggerWords(trainer),
        LayerNormsFile(
            run.dirpath / LAYER_NORMS_FILE, partial(context.norms.read, context.learner.named_sizes), thresholds
        ),
    ]
    return SinkDispatcher([*sinks, *own], run, thresholds)


def fit_advice(run: RunInfo, thresholds: RecordsThresholds = RECORDS) -> FitLog[Advice]:
    """The advice log of a fit; on other ranks than 0 it neither writes nor shows advice.

    Args:
        run: Facts about the fit.
        thresholds: How many records wait in memory while the file cannot be written.
    """
    sink = JsonLines(run.dirpath / ADVICE_FILE, thresholds) if run.rank == 0 else None
    return FitLog(describe_advice, sink, run.run_id, logging.WARNING)


def fit_outcomes(run: RunInfo, thresholds: RecordsThresholds) -> tuple[FitLog[Receipt], FitLog[HeldTrial]]:
    """The logs of receipts and trials of a fit; on other ranks than 0 they keep them in memory only.

    Args:
        run: Facts about the fit.
        thresholds: How many records wait in memory while the file cannot be written.
    """
    receipts, trials = (
        JsonLines(run.dirpath / name, thresholds, warns=False) if run.rank == 0 else None
        for name in (RECEIPTS_FILE, TRIALS_FILE)
    )
    return FitLog(Receipt.told, receipts, run.run_id), FitLog(HeldTrial.told, trials, run.run_id)
