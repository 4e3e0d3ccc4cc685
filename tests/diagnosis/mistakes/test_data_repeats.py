"""Batches that come again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_nanguard.diagnosis.mistakes.data_repeats import data_repeats
from lightning_nanguard.diagnosis.mistakes.observation import Observation
from tests.diagnosis.mistakes.seen import WELL, said


@pytest.mark.parametrize(
    ("seen", "place"),
    [
        (WELL, None),
        (replace(WELL, distinct=1), "the training data"),
        (replace(WELL, distinct=4), "the training data"),
        (replace(WELL, distinct=7), None),
        (replace(WELL, batches=4, distinct=1), None),
    ],
)
def test_it_is_named_and_what_is_meant_is_not(seen: Observation, place: str | None) -> None:
    """Many batches of one epoch that are the same; not a few, and not in a short epoch."""
    assert said(data_repeats, seen) == place
