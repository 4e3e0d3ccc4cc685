"""Receipts are written, read again and found by their intervention."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from lightning_nanguard import Intervention, Receipt
from lightning_nanguard.record.receipts import receipt_of

GAINED = Receipt(80, 144, "gained", 0.5, math.inf, 64)
NOT_MEASURED = Receipt(200, 210, "not measured", updates=10, reason="the run ended first")


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


def test_a_difference_that_does_not_count() -> None:
    """The words say why losses that differ make no clear difference; receipts without a reason are told, too."""
    receipt = Receipt(2, 130, "no difference", 7.862, 71.82, 128, reason="the difference is 0.52 % of …")
    told = "made no clear difference: 128 updates later the loss is 7.862, and 71.82 without it on the same batches"
    assert receipt.in_words() == f"{told}; the difference is 0.52 % of …"
    assert replace(receipt, reason="").in_words() == told


@pytest.mark.parametrize("line", ["{}", '{"intervention_step": 1, "global_step": 2, "verdict": "good"}', "[1]", '"x"'])
def test_what_is_no_receipt_is_refused(line: str) -> None:
    """A line that holds something else raises a ValueError that says so."""
    with pytest.raises(ValueError, match="not a receipt"):
        Receipt.from_dict(json.loads(line))
