"""Gradients that add up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_nanguard.diagnosis.mistakes.gradient_not_zeroed import gradient_not_zeroed
from lightning_nanguard.diagnosis.mistakes.observation import Observation
from tests.diagnosis.mistakes.seen import WELL, said


@pytest.mark.parametrize(
    ("seen", "place"),
    [
        (WELL, None),
        (replace(WELL, added=3), None),
        (replace(WELL, added=4), "gradient"),
    ],
)
def test_it_is_named_and_what_is_meant_is_not(seen: Observation, place: str | None) -> None:
    """Gradients that are added to used ones several times in a row."""
    assert said(gradient_not_zeroed, seen) == place
