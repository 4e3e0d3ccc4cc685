"""Rates with which nothing is learned. Each mistake is named, and what is meant is not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_nanguard.diagnosis.mistakes.observation import Observation, RateSeen
from lightning_nanguard.diagnosis.mistakes.rates import learning_rate_zero, schedule_ended
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
def test_learning_rate_zero(seen: Observation, place: str | None) -> None:
    """All groups of an optimizer at zero in every update; not one of several, not a warm-up, and not where the
    parameters change all the same."""
    assert said(learning_rate_zero, seen) == place


ENDED = (RateSeen(0, 0, 0.1, 1e-6),)


@pytest.mark.parametrize(
    ("seen", "place"),
    [
        (WELL, None),
        (replace(WELL, scheduled=True, rates=ENDED), "optimizer 0"),
        (replace(WELL, scheduled=True, rates=ENDED, expected=1000.0), "optimizer 0"),
        (replace(WELL, scheduled=True, rates=ENDED, expected=100.0), None),
        (replace(WELL, scheduled=False, rates=ENDED), None),
        (replace(WELL, scheduled=True, rates=(replace(ENDED[0], rose=True),)), None),
        (replace(WELL, scheduled=True, rates=(*ENDED, RateSeen(0, 1, 0.1, 0.05))), None),
    ],
)
def test_schedule_ended(seen: Observation, place: str | None) -> None:
    """A rate next to nothing with most of the run to come; not one that comes again, or ends with the run."""
    assert said(schedule_ended, seen) == place
