"""Loggers are told the numbers of the run after each intervention."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_nanguard.record.loggers import Loggers, RunNumbers
from tests.record.data import SKIP


def test_what_is_known_is_logged() -> None:
    """Each number goes under its name; what is None is left out."""
    rows: list[Mapping[str, float]] = []
    numbers = iter([RunNumbers(1, 1.0), RunNumbers(2, 0.5, 4.0)])
    sink = Loggers(lambda: next(numbers), rows.append)
    sink.write(SKIP)
    sink.write(SKIP)
    assert rows == [
        {"nanguard/interventions": 1.0, "nanguard/lr_multiplier": 1.0},
        {
            "nanguard/interventions": 2.0,
            "nanguard/lr_multiplier": 0.5,
            "nanguard/clip_val": 4.0,
        },
    ]
