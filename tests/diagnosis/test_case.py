"""What a rule is given."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_nanguard import NO_FAULT, Case, Course, Curvature, Origin, Range
from lightning_nanguard.thresholds.diagnosis import PlateauThresholds

FLAT = Course(updates=100, first=2.0, before=2.0, now=2.0, spread=0.01, norm=1.0)


def test_an_empty_case_is_one() -> None:
    """Every part may be missing; without a fault the case is that of a look at a run or a model."""
    case = Case()
    assert case.fault is NO_FAULT
    assert (case.clues.bad_fields, case.model, case.course, case.curvature) == ((), None, None, None)


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


def test_numbers_that_are_derived() -> None:
    """The place of an operation, the root mean square of an input, and the largest rate along a direction."""
    assert Origin("log", "net.2", "model.py:41").place == "net.2 (log, model.py:41)"
    assert Origin("log", backward=True).place == "training_step (backward of log)"
    assert Range("0", "float32", -4.0, 4.0, mean=3.0, std=4.0).magnitude == 5.0
    assert Curvature(slope=1.0, bend=4.0).largest_rate == 0.5
    assert Curvature(slope=1.0, bend=-4.0).largest_rate is None
