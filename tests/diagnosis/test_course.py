"""What the course of a run shows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_nanguard import Course
from lightning_nanguard.thresholds.diagnosis import PlateauThresholds

FLAT = Course(updates=100, first=2.0, before=2.0, now=2.0, spread=0.01, norm=1.0)


@pytest.mark.parametrize(
    ("now", "moves", "falls", "rises", "high"),
    [
        (2.0, False, False, False, True),
        (1.95, False, True, False, True),
        (1.5, True, True, False, True),
        (1.0, True, True, False, False),
        (2.6, False, False, True, True),
    ],
)
def test_how_a_loss_went(now: float, moves: bool, falls: bool, rises: bool, high: bool) -> None:
    """A loss moves by a share of the first one, falls by a share of its own level, and rises to leave it."""
    course = replace(FLAT, now=now)
    assert (course.moves(), course.falls(), course.rises(), course.high()) == (moves, falls, rises, high)
    # What it moves from part to part is no movement.
    noisy = replace(course, spread=1.0)
    assert (noisy.moves(), noisy.falls(), noisy.rises()) == (False, False, False)
    assert replace(course, now=1.9).moves(PlateauThresholds(moved=0.01))


def test_a_loss_at_chance_level_is_high() -> None:
    """However far it is below the first loss."""
    assert not replace(FLAT, now=0.5).high()
    assert replace(FLAT, now=0.5, chance=0.5).high()
