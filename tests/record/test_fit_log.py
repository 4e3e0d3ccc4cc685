"""Advice and receipts are kept in memory, told, and written where that can be done."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lightning_nanguard.record.files import read_file
from lightning_nanguard.record.fit_log import FitLog
from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.record.receipts import RECEIPTS_FILE, Receipt
from tests.record.test_receipts import GAINED, NOT_MEASURED


def test_receipts_come_back_as_they_were(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is read from the file equals what was given, with the run's id; a torn line is left out."""
    caplog.set_level(logging.INFO, "lightning_nanguard")
    log: FitLog[Receipt] = FitLog(Receipt.told, JsonLines(tmp_path / RECEIPTS_FILE), "a-run")
    log.give(GAINED)
    log.give(NOT_MEASURED)
    log.close()
    assert "intervention of step 80: helped: 64 updates later the loss is 0.5, and inf without it" in caplog.text
    with (tmp_path / RECEIPTS_FILE).open("a") as file:
        file.write('{"verdict": ')
    assert log.given == [GAINED, NOT_MEASURED]
    assert read_file(tmp_path / RECEIPTS_FILE, Receipt.from_dict) == log.given
    assert [one.run for one in read_file(tmp_path / RECEIPTS_FILE, Receipt.from_dict)] == ["a-run", "a-run"]


def test_a_file_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    """Receipts stay in memory where the folder cannot be made."""
    (tmp_path / "file").write_text("")
    log: FitLog[Receipt] = FitLog(Receipt.told, JsonLines(tmp_path / "file" / RECEIPTS_FILE, warns=False))
    log.give(GAINED)
    log.close()
    assert log.given == [GAINED]
