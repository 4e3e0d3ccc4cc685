"""Uploads the page of a run to loggers that store files, at the end of a fit."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from lightning_nanguard.report.data import read_run_data
from lightning_nanguard.report.page import page
from lightning_nanguard.trainer.private.packages import Trainer, is_kind

_logger = logging.getLogger("lightning_nanguard")


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
            _give(logger, file, run_id)
        except Exception as error:
            _logger.warning("NaNGuard: %s did not accept the page of the run: %s", type(logger).__name__, error)


def _give(logger: Any, file: Path, run_id: str) -> None:
    if is_kind(logger, "MLFlowLogger"):
        logger.experiment.log_artifact(logger.run_id, str(file), "nanguard")
        return
    artifact = sys.modules["wandb"].Artifact(f"nanguard-report-{run_id}", type="report")
    artifact.add_file(str(file))
    logger.experiment.log_artifact(artifact)
