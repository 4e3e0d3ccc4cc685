"""The history of an optimizer's readings: what it keeps, and what it says of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lightning_nanguard import DivergingLoss
from lightning_nanguard.detect.history import ReadingHistory
from lightning_nanguard.thresholds.detection import HistoryThresholds
from tests.detect.readings import reading


def test_a_climb_before_a_fault_is_seen() -> None:
    """A history that leaves its range upwards counts as climbing; noise does not."""
    calm, climbing = ReadingHistory(), ReadingHistory()
    for step in range(30):
        calm.accept(reading(step, 2.0 + 0.1 * (step % 4), 1.0))
        climbing.accept(reading(step, 2.0 + 0.1 * (step % 4) + (0 if step < 27 else 5.0 * (step - 26)), 1.0))
    assert not calm.climbing()
    assert climbing.climbing()


@pytest.mark.parametrize(
    ("losses", "falling"),
    [
        ([2.0] + [0.5 + 0.1 * (step % 5) for step in range(40)], False),
        ([2.0 - 0.03 * step + 0.1 * (step % 5) for step in range(41)], True),
        ([2.0] + [0.5 + 0.1 * (step % 5) for step in range(30)], True),
        ([-1.0 - 0.1 * step for step in range(41)], True),
    ],
    ids=["at rest", "falling", "too few to tell", "below zero"],
)
def test_a_loss_at_rest_is_told_from_one_that_falls(losses: list[float], falling: bool) -> None:
    """The newest losses are compared with as many before them, beside their noise."""
    history = ReadingHistory()
    for step, loss in enumerate(losses):
        history.accept(reading(step, loss, 1.0))
    assert history.falling() is falling


@pytest.mark.parametrize(
    ("norms", "came_out_of_nothing"),
    [
        ([1.0, 0.5, 0.6, 0.5, 30.0, 2.0, 0.5], True),  # an outlier among the data
        ([1.0, 0.5, 0.6, 30.0, 2.0, 0.5], False),  # of a beginning nothing is known yet
        ([1.0, 0.5, 0.6, 0.5, 4.0, 20.0, 90.0, 400.0], False),  # a rate that is too high
        ([1.0, 0.5, 0.6, 0.5, 9.0, 0.5], False),  # noise
        ([1.0, *[1e-30] * 8, 0.9], False),  # saturated units that come back
    ],
)
def test_a_gradient_that_came_out_of_nothing_is_seen(norms: list[float], came_out_of_nothing: bool) -> None:
    """A single gradient far above all before it is a burst; norms that climb to it are not."""
    history = ReadingHistory()
    for step, norm in enumerate(norms):
        history.accept(reading(step, 1.0, norm))
    assert history.burst() is came_out_of_nothing


def test_the_untrained_loss_is_read_again_from_the_start() -> None:
    """Where all was rewound, the next loss is the untrained model's."""
    history, detector = ReadingHistory(), DivergingLoss()
    for one in (history, detector):
        one.accept(reading(1, 1e28))
        one.accept(reading(2, 5.0))
        one.rewind(1)
        one.accept(reading(3, 6.0))
    assert history.first == detector.state_dict()["first"] == 1e28
    for one in (history, detector):
        one.rewind(0)
    assert history.first == detector.state_dict()["first"] == 1e28
    for one in (history, detector):
        one.accept(reading(4, 7.0))
        one.accept(reading(5, 6.0))
    assert history.first == detector.state_dict()["first"] == 7.0


def test_the_level_of_a_loss_is_no_median() -> None:
    """A ruined model that is right on most batches and far off on the others is at no low level."""
    history, usual = ReadingHistory(), ReadingHistory()
    for step, loss in enumerate([0.0, 0.0, 0.0, 15.0, 2.5, 0.0, 13.0, 0.0]):
        history.accept(reading(step, loss, 1.0))
        usual.accept(reading(step, 2.0 + 0.01 * step, 1.0))
    level, steady = history.level(), usual.level()
    assert level is not None
    assert level > 2.0
    assert steady == pytest.approx(2.03)


def test_norms_of_a_saturated_model_are_not_usual() -> None:
    """Where a rate has saturated all units, the gradient to clip at is that of a model that still learns."""
    history = ReadingHistory()
    for step in range(30):
        history.accept(reading(step, 1.0, 3.0 if step == 0 else 1e-30))
    assert history.usual_norm() == pytest.approx(0.03)
    resumed = ReadingHistory()
    resumed.load_state_dict(history.state_dict())
    assert resumed.usual_norm() == history.usual_norm()


def test_the_unit_is_what_was_learned() -> None:
    """How far the best level lies below the first loss; a rise does not make it larger, nor does a rollback smaller."""
    history = ReadingHistory()
    assert (history.level(), history.learning()) == (None, False)
    for step in range(40):
        history.accept(reading(step, 1003.0 - 0.1 * min(step, 20)))
    assert history.loss_unit() == pytest.approx(2.0)
    assert history.learning()
    for step in range(40, 60):
        history.accept(reading(step, 1003.0))
    history.rewind(50)
    assert history.loss_unit() == pytest.approx(2.0)
    assert not history.learning()


def test_what_is_not_finite_or_not_there_is_left_out() -> None:
    """A reading without a finite loss or norm has none in the history."""
    history = ReadingHistory()
    history.accept(reading(0, None, 1.0))
    history.accept(reading(1, 2.0, None))
    history.accept(reading(2, 1.0, math.inf, scaler_skips=True))
    assert history.first == 2.0
    assert history.losses() == [2.0, 1.0]
    assert history.state_dict()["norms"] == [[0, 1.0]]
    resumed = ReadingHistory()
    resumed.load_state_dict(history.state_dict())
    assert resumed.state_dict() == history.state_dict()


def test_thresholds() -> None:
    """What is kept and looked at are thresholds."""
    history = ReadingHistory(replace(HistoryThresholds(), readings=6, recent=4))
    for step in range(10):
        history.accept(reading(step, 10.0 - step))
    assert history.losses(4) == [4.0, 3.0, 2.0, 1.0]
    assert history.losses() == [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    assert history.falling()
