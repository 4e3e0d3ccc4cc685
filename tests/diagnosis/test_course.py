"""The course of a loss: whether it moves, and when this is asked."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from lightning_nanguard import Course, Reading
from lightning_nanguard.detect.history import ReadingHistory
from lightning_nanguard.diagnosis.course import LossProgress
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


def examined_after(losses: list[float], patience: int) -> list[int]:
    """Updates after which a run of these losses is examined."""
    trend, progress, found = ReadingHistory(), LossProgress(patience), []
    for step, loss in enumerate(losses, 1):
        trend.accept(Reading(step, 0, loss, 1.0))
        if progress.due(step):
            progress.take_level(step, trend)
            course = progress.course(step, trend)
            if course is not None and progress.stuck(step, course):
                found.append(step)
    return found


def test_patience_grows() -> None:
    """A loss that stands still is examined once the patience is over, and then ever more rarely."""
    found = examined_after([1.0] * 1000, 100)
    assert 100 <= found[0] <= 120
    assert len(found) == 4
    gaps = [later - earlier for earlier, later in pairwise(found)]
    assert gaps == sorted(gaps)


def test_a_falling_loss_is_not_examined() -> None:
    """However slowly, as long as it falls by more than it moves otherwise."""
    generator = torch.Generator().manual_seed(0)
    noise = (0.02 * torch.randn(1000, generator=generator)).tolist()
    assert examined_after([3.0 - 0.002 * i + noise[i] for i in range(1000)], 200) == []


def test_the_newest_losses_alone_make_a_course() -> None:
    """Where nobody took levels on the way, the course is that of the losses still known."""
    history = ReadingHistory()
    for step in range(1, 65):
        history.accept(Reading(step, 0, 10.0 - 0.1 * step, 1.0))
    course = LossProgress.of(history).course(64, history)
    assert course is not None
    assert course.before > course.now
    assert course.moves()
