"""Builds the sinks and the advice log of one fit, and tells the trainer's loggers what the guard does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, final

from lightning_nanguard.guard.guard import Guard
from lightning_nanguard.record.advice import AdviceLog
from lightning_nanguard.record.base import RunInfo, Sink
from lightning_nanguard.record.console import Console
from lightning_nanguard.record.dispatch import SinkDispatcher
from lightning_nanguard.record.files import ADVICE_FILE, RECORDS_FILE
from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.record.loggers import Loggers, RunNumbers
from lightning_nanguard.record.memory import Memory
from lightning_nanguard.thresholds.records import RECORDS, RecordsThresholds
from lightning_nanguard.trainer.private.packages import LightningModule, Trainer, logged_at


class LoggedRun(Protocol):
    """What the loggers are told of."""

    in_batch: bool
    """Whether a batch is at hand, in which alone the progress bar can be told."""

    @property
    def guard(self) -> Guard:
        """The guard of the fit."""


def run_info(trainer: Trainer, dirpath: Path | None) -> RunInfo:
    """What sinks may know of a fit. All ranks have to call it, since Lightning broadcasts the log folder.

    Args:
        trainer: The trainer.
        dirpath: Folder of the records; ``None`` for ``nanguard`` in the trainer's log folder.
    """
    folder = dirpath if dirpath is not None else Path(trainer.log_dir or trainer.default_root_dir) / "nanguard"
    return RunInfo(trainer.global_rank, trainer.world_size, folder)


def fit_sinks(
    trainer: Trainer,
    module: LightningModule,
    run: RunInfo,
    memory: Memory,
    own: Sequence[Sink],
    running: Callable[[], LoggedRun],
    thresholds: RecordsThresholds = RECORDS,
) -> SinkDispatcher:
    """All sinks of a fit: memory and file before everything else, the user's own last.

    Args:
        trainer: The trainer.
        module: Its module.
        run: What sinks may know of the fit.
        memory: Keeps interventions from one fit to the next.
        own: The user's sinks.
        running: Gives the run of this fit once it has begun.
        thresholds: How much is recorded, shown and kept.
    """
    metrics = _TrainerMetrics(trainer, module, memory, running)
    sinks = [
        memory,
        JsonLines(run.dirpath / RECORDS_FILE, thresholds),
        Console(thresholds),
        Loggers(metrics.numbers, metrics.log),
    ]
    return SinkDispatcher([*sinks, *own], run, thresholds)


def fit_advice(run: RunInfo, thresholds: RecordsThresholds = RECORDS) -> AdviceLog:
    """The advice log of a fit; on other ranks than 0 it neither writes nor shows advice.

    Args:
        run: What is known of the fit.
        thresholds: How much advice is taken.
    """
    return AdviceLog(JsonLines(run.dirpath / ADVICE_FILE, thresholds) if run.rank == 0 else None, thresholds)


@final
class _TrainerMetrics:
    """Gives the numbers of the run, and logs them in every logger of the trainer and in its progress bar."""

    def __init__(
        self, trainer: Trainer, module: LightningModule, memory: Memory, running: Callable[[], LoggedRun]
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._memory = memory
        self._running = running

    def numbers(self) -> RunNumbers:
        guard = self._running().guard
        return RunNumbers(self._memory.total, guard.rate.ratio(), guard.usual_norm(), guard.clip_val)

    def log(self, values: Mapping[str, float]) -> None:
        for logger in self._trainer.loggers:
            logger.log_metrics(dict(values), step=logged_at(self._trainer))
        if self._running().in_batch and self._trainer.progress_bar_callback is not None:
            count = values["nanguard/interventions"]
            self._module.log("nanguard", count, prog_bar=True, logger=False, rank_zero_only=True)
