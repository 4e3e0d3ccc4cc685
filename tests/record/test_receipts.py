"""Receipts are written, read again and found by their intervention."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest

from lightning_nanguard import Intervention, Receipt
from lightning_nanguard.record.files import read_receipts
from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.record.receipts import RECEIPTS_FILE, ReceiptLog, receipt_of

GAINED = Receipt(80, 144, "gained", 0.5, math.inf, 64)
NOT_MEASURED = Receipt(200, 210, "not measured", updates=10, reason="the run ended first")


def test_receipts_come_back_as_they_were(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is read from the file equals what was given, with the run's id; a torn line is left out."""
    caplog.set_level(logging.INFO, "lightning_nanguard")
    log = ReceiptLog(JsonLines(tmp_path / RECEIPTS_FILE), "a-run")
    log.give(GAINED)
    log.give(NOT_MEASURED)
    log.close()
    assert "intervention of step 80 gained: 64 updates later the loss is 0.5, and inf without it" in caplog.text
    with (tmp_path / RECEIPTS_FILE).open("a") as file:
        file.write('{"verdict": ')
    assert log.given == [GAINED, NOT_MEASURED]
    assert read_receipts(tmp_path / RECEIPTS_FILE) == log.given
    assert [one.run for one in read_receipts(tmp_path / RECEIPTS_FILE)] == ["a-run", "a-run"]


def test_a_receipt_belongs_to_its_intervention() -> None:
    """It is found by run and step, and not for a record of the same step that changed nothing."""
    receipts = [
        Receipt(80, 144, "cost", 2.0, 1.0, 64, True, run="b"),
        Receipt(80, 144, "gained", 1.0, 2.0, 64, run="a"),
    ]
    acted = Intervention(80, 0, 80, "stuck_loss", "loss", ("restore", "scale"), 0.1, 0.05, run="a")
    told = Intervention(80, 0, 80, "stuck_loss", "loss", (), 0.1, 0.1, run="a")
    assert receipt_of(acted, receipts) is receipts[1]
    assert receipt_of(told, receipts) is None
    assert receipts[0].in_words().endswith("; it was taken back")


@pytest.mark.parametrize("line", ["{}", '{"intervention_step": 1, "global_step": 2, "verdict": "good"}', "[1]", '"x"'])
def test_what_is_no_receipt_is_refused(line: str) -> None:
    """A line that holds something else raises a ValueError that says so."""
    with pytest.raises(ValueError, match="not a receipt"):
        Receipt.from_dict(json.loads(line))


def test_a_file_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    """Receipts stay in memory where the folder cannot be made."""
    (tmp_path / "file").write_text("")
    log = ReceiptLog(JsonLines(tmp_path / "file" / RECEIPTS_FILE, warns=False))
    log.give(GAINED)
    log.close()
    assert log.given == [GAINED]
