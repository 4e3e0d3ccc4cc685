"""DivergingLoss asks at growing distances whether a loss falls as it could, and says how it looks."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest

from lightning_nanguard import DivergingLoss
from lightning_nanguard.detect.base import AT_ONCE
from lightning_nanguard.thresholds.detection import DivergingLossThresholds
from tests.detect.readings import learning_curve, looked_into, reading

SHAPES: list[tuple[str, Callable[[int], float], set[str]]] = [
    ("falling", learning_curve, {"stuck_loss"}),
    ("negative and falling", lambda step: -step / 10, {"stuck_loss"}),
    ("zero", lambda step: 0.0, {"stuck_loss"}),
    ("exploding", lambda step: 2.3 * 1.3 ** max(0, step - 20), {"exploding_loss"}),
    ("exploded, and falling since", lambda step: 2.3 if step < 5 else 1e6 / (1 + step), {"exploding_loss"}),
    ("back at chance", lambda step: learning_curve(step) if step < 150 else 2.29, {"stuck_loss", "collapsed"}),
    ("harder data from the middle on", lambda step: learning_curve(step) + 0.5 * (step > 100), {"stuck_loss"}),
    ("right on most, far off on a few", lambda step: learning_curve(step) + 20 * (step % 8 == 0), {"stuck_loss"}),
]


DUE = [39, 79, 159, 319]
"""The checks that are due."""


@pytest.mark.parametrize(("losses", "kinds"), [shape[1:] for shape in SHAPES], ids=[shape[0] for shape in SHAPES])
def test_how_a_loss_looks(losses: Callable[[int], float], kinds: set[str]) -> None:
    """A loss above the first one, or back near it, looks bad; any other is only asked about."""
    faults = looked_into(DivergingLoss(), [losses(step) for step in range(330)])
    assert {fault.kind for _, fault in faults} == kinds
    assert [step for step, _ in faults if step in DUE] == DUE
    for step, fault in faults:
        assert (fault.scope, fault.certain, fault.proof) == ("learner", False, "trial")
        assert fault.doubtful == (fault.kind == "stuck_loss" or step not in DUE)
        assert f"{losses(0):.4g}" in fault.message
        assert ("a lower learning rate may do better" in fault.message) == (fault.kind == "stuck_loss")


def test_a_rollback_starts_the_distances_anew() -> None:
    """The first question comes after ``patience`` updates, and again so many after a rollback."""
    detector = DivergingLoss(patience=20)
    assert [step for step, _ in looked_into(detector, [1.0] * 50)] == [19, 39]
    detector.rewind(30)
    assert [step for step, _ in looked_into(detector, [1.0] * 50, start=50)] == [69, 89]


def test_what_was_learned_is_lost_between_two_checks() -> None:
    """A loss that rises far above its best level is suspected at once, and once only until it has come down again."""

    def losses(step: int) -> float:
        return learning_curve(step) if step % 300 < 170 else 1.6

    faults = [(step, fault) for step, fault in looked_into(DivergingLoss(), [losses(step) for step in range(600)])]
    between = [step for step, fault in faults if step not in DUE]
    assert len(between) == 2
    assert all(170 < step % 300 < 190 for step in between)
    assert all(fault.doubtful for step, fault in faults if step in between)


def test_a_loss_that_rises_again_and_again_is_suspected_at_growing_distances() -> None:
    """The number of suspicions grows with the logarithm of the updates."""
    losses = [2.0 if step < 20 or step % 50 < 25 else 1.0 for step in range(2000)]
    between = [
        step for step, _ in looked_into(DivergingLoss(), losses) if step + 1 not in {40 << one for one in range(8)}
    ]
    assert 2 <= len(between) <= 6
    assert all(later >= 2 * step for step, later in itertools.pairwise(between))


def test_limits_hold_until_it_asks_again() -> None:
    """Within the next readings accepted at once no question is missed."""
    detector = DivergingLoss()
    for step in range(200):
        if detector.check(reading(step)) is not None:
            assert detector.limits().loss == -math.inf
        if detector.limits().loss == math.inf:
            assert detector._next - step > AT_ONCE
        detector.accept(reading(step))


@pytest.mark.parametrize("exponent", [-40, -3, 5, 60])
def test_the_unit_of_the_loss_does_not_matter(exponent: int) -> None:
    """Losses times a power of two lead to the same faults at the same steps, bit for bit."""
    draw = random.Random(0)
    for shape, _ in itertools.product([shape[1] for shape in SHAPES], range(5)):
        losses = [shape(step) * math.exp(draw.gauss(0, 0.3)) for step in range(330)]
        plain = looked_into(DivergingLoss(), losses)
        scaled = looked_into(DivergingLoss(), [math.ldexp(loss, exponent) for loss in losses])
        assert [(step, fault.kind) for step, fault in plain] == [(step, fault.kind) for step, fault in scaled]
        assert [math.ldexp(fault.value or 0.0, exponent) for _, fault in plain] == [fault.value for _, fault in scaled]


@pytest.mark.parametrize("shift", [-1e6, 37.0, 1e6])
def test_where_zero_lies_does_not_matter(shift: float) -> None:
    """Losses plus a constant lead to the same faults at the same steps."""
    for shape in (shape[1] for shape in SHAPES):
        losses = [shape(step) for step in range(330)]
        plain, shifted = (looked_into(DivergingLoss(), [loss + by for loss in losses]) for by in (0.0, shift))
        assert [(step, fault.kind) for step, fault in plain] == [(step, fault.kind) for step, fault in shifted]


def test_uneasy_above_the_middle() -> None:
    """Two losses in a row nearer to the first one than to the best level cast doubt on the state; one is noise."""
    detector = DivergingLoss()
    assert not detector.uneasy(reading(0))
    for step in range(60):
        detector.accept(reading(step, 3.0 - 0.04 * min(step, 50)))
    assert not detector.uneasy(reading(60, 9.0))
    detector.accept(reading(60, 9.0))
    assert not detector.uneasy(reading(60, 9.0))
    assert [detector.uneasy(reading(61, loss)) for loss in (1.0, 1.9, 2.1, 9.0)] == [False, False, True, True]


def test_first_and_best() -> None:
    """The best loss is a level, the median of some; before there is one, it is the untrained model's loss."""
    detector, bests = DivergingLoss(thresholds=DivergingLossThresholds(level_readings=3)), []
    for step, loss in enumerate([5.0, 1.0, 4.0, 3.0, 2.0, 9.0, 9.0]):
        detector.accept(reading(step, loss))
        bests.append(detector._best_level())
    # A loss above the best level cannot lower it, and is no reason to look.
    assert bests == [5.0, 5.0, 4.0, 3.0, 3.0, 3.0, 3.0]
    assert (detector._first, detector._since) == (5.0, 7)


def test_what_a_rewind_leaves() -> None:
    """A rollback keeps the best level and the untrained loss, unless everything was rewound, and counts anew."""
    detector = DivergingLoss(thresholds=DivergingLossThresholds(level_readings=2))
    for step, loss in enumerate([5.0, 1.0, 4.0], start=3):
        detector.accept(reading(step, loss))
    for step, kept, best in ((4, [5.0, 1.0], 3.0), (2, [], 5.0)):
        detector.rewind(step)
        assert (detector._losses.values(), detector._first, detector._best_level()) == (kept, 5.0, best)
        assert detector._since == 0
    detector.accept(reading(9, 7.0))
    assert (detector._first, detector._best_level()) == (7.0, 7.0)


def test_losses_that_are_not_there_are_left_out() -> None:
    """An update without a finite loss is neither judged nor remembered."""
    detector = DivergingLoss(patience=8)
    for step in range(40):
        for loss in (None, math.nan):
            assert detector.check(reading(step, loss)) is None
            detector.accept(reading(step, loss))
    assert detector.state_dict()["first"] is None


def test_it_resumes_where_it_was() -> None:
    """A detector that took up another's state asks at the same steps; an older state without a plan asks later."""
    detector, resumed, old = DivergingLoss(), DivergingLoss(), DivergingLoss()
    looked_into(detector, [1.0] * 100)
    resumed.load_state_dict(detector.state_dict())
    state = {key: value for key, value in detector.state_dict().items() if key != "next"}
    old.load_state_dict({**state, "dismissed": {}, "rise": [None, 0.0, 0]})
    assert [step for step, _ in looked_into(resumed, [1.0] * 100, start=100)] == [159]
    assert [step for step, _ in looked_into(old, [1.0] * 150, start=100)] == [100, 201]


def test_arguments() -> None:
    """What is out of range is refused; arguments of version 0.1.0 that have no effect any more say so."""
    with pytest.raises(ValueError, match=r"DivergingLoss\(patience=4\): expected an integer of at least 8"):
        DivergingLoss(patience=4)
    with pytest.warns(FutureWarning, match=r"DivergingLoss\(factor=…\) has no effect any more"):
        DivergingLoss(factor=10.0)
