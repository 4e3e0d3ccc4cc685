"""Loggers get the numbers of the guard after each intervention."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from lightning_nanguard import NaNGuard
from tests.helpers import ONCE, MemoryLogger, fit, task, with_bad
from tests.modules import Diverge


def test_only_what_is_known_is_logged() -> None:
    """Without a clipping value none is logged."""
    logger = MemoryLogger()
    fit(task(), with_bad(4), NaNGuard(), logger=logger)
    rows = [row for _, row in logger.rows if "nanguard/interventions" in row]
    assert rows == [{"nanguard/interventions": 1.0, "nanguard/lr_multiplier": 1.0}]


def test_numbers_in_the_loggers(tmp_path: Path) -> None:
    """CSVLogger and TensorBoardLogger get the count, the multiplier, and the clipping value once there is one."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [CSVLogger(tmp_path, "csv", "0"), TensorBoardLogger(str(tmp_path), "tb", "0")]
    guard = NaNGuard(snapshot_every_n_steps=2, thresholds=ONCE)
    # A batch is skipped and, before that, the learner slowed and clipped.
    fit(task(), with_bad(20), guard, logger=loggers, callbacks=[Diverge(7, 10)])
    assert guard.lr_multiplier < 1.0
    counts = [float(number + 1) for number in range(len(guard.interventions))]
    with open(tmp_path / "csv" / "0" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get("nanguard/interventions")]
    assert [float(row["nanguard/interventions"]) for row in rows] == counts
    assert float(rows[-1]["nanguard/lr_multiplier"]) == pytest.approx(guard.lr_multiplier)
    assert float(rows[-1]["nanguard/clip_val"]) > 0
    events = EventAccumulator(str(tmp_path / "tb" / "0"))
    events.Reload()
    assert [event.value for event in events.Scalars("nanguard/interventions")] == counts
    assert events.Scalars("nanguard/lr_multiplier")[-1].value == pytest.approx(guard.lr_multiplier)
