"""What the guard writes to the trainer's loggers: its settings, numbers, curves and words, and the page of a run."""

from __future__ import annotations

import inspect
import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, final

from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.record.base import Sink
from lightning_nanguard.record.memory import Memory
from lightning_nanguard.record.messages import tell, tell_again
from lightning_nanguard.report.data import read_run_data
from lightning_nanguard.report.page import page
from lightning_nanguard.thresholds.records import RecordsThresholds
from lightning_nanguard.trainer.private.packages import LightningModule, Trainer, is_kind, logged_at, logs_every
from lightning_nanguard.types import Intervention, Kind, Reading

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


@final
class LoggerWords(Sink):
    """Writes the 1st, 2nd, 4th, 8th … intervention of each kind as text to loggers that support text.

    TensorBoard shows them under Text, W&B as a table, MLflow as the artifact ``nanguard/interventions.txt``; CSV files
    have no text.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._seen: Counter[Kind] = Counter()
        self._rows: list[list[Any]] = []

    def write(self, intervention: Intervention) -> None:
        """Log the intervention, or count it."""
        self._seen[intervention.kind] += 1
        seen = self._seen[intervention.kind]
        if seen & (seen - 1):
            return
        words = tell(intervention) if seen == 1 else f"{tell_again(intervention)} ({seen:,} so far)"
        step = logged_at(self._trainer)
        self._rows.append([step, words])
        for logger in self._trainer.loggers:
            self._log(logger, words, step)

    def _log(self, logger: Any, words: str, step: int) -> None:
        if hasattr(logger, "log_text"):  # W&B replaces the whole table
            rows = [list(row) for row in self._rows]
            logger.log_text("nanguard/interventions_told", columns=["step", "what"], data=rows, step=step)
        elif is_kind(logger, "MLFlowLogger"):  # MLflow replaces the whole file
            text = "".join(f"{row[1]}\n" for row in self._rows)
            logger.experiment.log_text(logger.run_id, text, "nanguard/interventions.txt")
        elif hasattr(getattr(logger, "experiment", None), "add_text"):
            # TensorBoard renders Markdown. A code block is not rendered.
            code = "\n".join(f"    {line}" for line in words.split("\n"))
            logger.experiment.add_text("nanguard/interventions", code, step)


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


def log_report(trainer: Trainer, folder: Path, run_id: str) -> None:
    """Log the page of a run as an artifact of each logger that stores files. An error is logged and does not end the
    run.

    W&B and MLflow store files. There is no page for a run without interventions and advice, or without matplotlib.

    Args:
        trainer: The trainer.
        folder: The folder of the run. Its records must be complete.
        run_id: The run's id.
    """
    loggers = [logger for logger in trainer.loggers if is_kind(logger, "MLFlowLogger", "WandbLogger")]
    if not loggers:
        return
    try:
        data = read_run_data(folder)
        if not (data.interventions or data.advice):
            return
        file = folder / "report.html"
        file.write_text(page(data), encoding="utf-8")
    except ModuleNotFoundError as error:
        _logger.info("NaNGuard: the loggers get no page of the run. %s", error)
        return
    except Exception as error:
        _logger.warning("NaNGuard: the loggers get no page of the run: %s", error)
        return
    for logger in loggers:
        try:
            _upload(logger, file, run_id)
        except Exception as error:
            _logger.warning("NaNGuard: %s did not accept the page of the run: %s", type(logger).__name__, error)


def _upload(logger: Any, file: Path, run_id: str) -> None:
    if is_kind(logger, "MLFlowLogger"):
        logger.experiment.log_artifact(logger.run_id, str(file), "nanguard")
        return
    artifact = sys.modules["wandb"].Artifact(f"nanguard-report-{run_id}", type="report")
    artifact.add_file(str(file))
    logger.experiment.log_artifact(artifact)
