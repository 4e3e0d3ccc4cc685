"""A learning rate of zero."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_nanguard.diagnosis.mistakes.learning_rate_zero import learning_rate_zero
from lightning_nanguard.diagnosis.mistakes.observation import Observation, RateSeen
from tests.diagnosis.mistakes.seen import WELL, said


@pytest.mark.parametrize(
    ("seen", "place"),
    [
        (WELL, None),
        (replace(WELL, rates=(RateSeen(0, 0, 0.0, 0.0),)), "optimizer 0"),
        (replace(WELL, rates=(RateSeen(0, 0, 0.1, 0.1), RateSeen(1, 0, 0.0, 0.0))), "optimizer 1"),
        (replace(WELL, rates=(RateSeen(0, 0, 0.1, 0.1), RateSeen(0, 1, 0.0, 0.0))), None),
        (replace(WELL, rates=(RateSeen(0, 0, 0.1, 0.0),)), None),
        (replace(WELL, rates=(RateSeen(0, 0, 0.0, 0.0, moved=False),)), "optimizer 0"),
        (replace(WELL, rates=(RateSeen(0, 0, 0.0, 0.0, moved=True),)), None),
    ],
)
def test_it_is_named_and_what_is_meant_is_not(seen: Observation, place: str | None) -> None:
    """All groups of an optimizer at zero in every update; not one of several, not a warm-up, and not where the
    parameters change all the same."""
    assert said(learning_rate_zero, seen) == place
