"""Loggers get the curves of the guard at Lightning's own steps."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.loggers import CSVLogger

from lightning_nanguard import NaNGuard
from tests.helpers import MemoryLogger, batches, fit, task, with_bad


def curve(logger: MemoryLogger, name: str) -> list[int | None]:
    return [step for step, row in logger.rows if name in row]


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"log_every_n_steps": 3}], ids=str)
def test_curves_at_lightnings_steps(tmp_path: Path, options: dict[str, Any]) -> None:
    """A healthy run has a point of each curve where Lightning logs the loss, once each."""
    logger = MemoryLogger()
    fit(task(), batches(count=12), NaNGuard(), folder=tmp_path, logger=logger, **options)
    losses = curve(logger, "loss_step")
    assert losses
    assert curve(logger, "nanguard/grad_norm") == curve(logger, "nanguard/lr") == losses
    assert {row["nanguard/lr"] for _, row in logger.rows if "nanguard/lr" in row} == {0.01}


def test_each_optimizer_has_its_curve(tmp_path: Path) -> None:
    """Under manual optimization the second optimizer's values have its number."""
    logger = MemoryLogger()
    fit(task("manual"), batches(count=6), NaNGuard(), folder=tmp_path, logger=logger)
    assert curve(logger, "nanguard/grad_norm_1") == curve(logger, "nanguard/grad_norm") != []


class Refusing(MemoryLogger):
    """A logger that does not take the guard's curves."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if "nanguard/lr" in metrics:
            raise ValueError("no slashes")
        super().log_metrics(metrics, step)


def test_a_logger_that_takes_no_curves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The run goes on, and the log names the logger, which gets no more of them."""
    with caplog.at_level(logging.WARNING):
        run = fit(task(), batches(count=4), NaNGuard(), folder=tmp_path, logger=Refusing())
    assert run.trainer.global_step == 4
    assert caplog.text.count("Refusing did not accept nanguard/grad_norm, nanguard/lr") == 1


def test_csv(tmp_path: Path) -> None:
    """A CSV file has the norm of every healthy update."""
    fit(task(), with_bad(4, 8, 12, count=16), NaNGuard(), logger=CSVLogger(tmp_path, "csv", "0"))
    with open(tmp_path / "csv" / "0" / "metrics.csv") as file:
        norms = [float(row["nanguard/grad_norm"]) for row in csv.DictReader(file) if row.get("nanguard/grad_norm")]
    assert len(norms) == 16 - 3
    assert all(norm > 0 for norm in norms)
