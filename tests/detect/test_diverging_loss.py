"""DivergingLoss finds losses that left for good; healthy oddities are no fault."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_nanguard import DivergingLoss
from lightning_nanguard.thresholds.detection import DivergingLossThresholds, OvershootThresholds
from tests.detect.readings import learning_curve, looked_into, reading, watch

SHAPES: list[tuple[str, Callable[[int], float], str | None]] = [
    ("falling", learning_curve, None),
    ("exploding", lambda step: 2.3 * 1.3 ** max(0, step - 20), "exploding_loss"),
    ("exploded at once", lambda step: 2.3 if step < 5 else 1e6 * (1 + step), "exploding_loss"),
    ("back at chance", lambda step: learning_curve(step) if step < 150 else 2.3, "collapsed"),
    ("never learned after a climb", lambda step: 2.3 if step == 0 else 6.0 if step < 10 else 2.31, "stuck_loss"),
    ("far up at first, and learning since", lambda step: 15.0 if 0 < step < 4 else learning_curve(step), "overshoot"),
    ("a jump that falls again", lambda step: learning_curve(step) + (step > 100) * 40 * math.exp((100 - step) / 5),
     "overshoot"),
    ("a lower one", lambda step: learning_curve(step) + (step > 100) * 4 * math.exp((100 - step) / 5), None),
    ("right on some, far off on others", lambda step: learning_curve(step) + (step > 150 and step % 3 == 0) * 20,
     "unsteady_loss overshoot"),
    ("at rest at chance, below a poor start", lambda step: max(2.3, 3.9 - 0.2 * step), "stuck_loss"),
    ("negative", lambda step: -step / 10, None),
    ("a policy gradient's: from 0 down, and most of the way back",
     lambda step: -0.01 - min(3.0, step / 20) + 0.03 * min(80, max(0, step - 60)), None),
    ("zero", lambda step: 0.0, None),
    ("harder data from the middle on", lambda step: learning_curve(step) + (0.9 if step > 100 else 0), None),
]  # fmt: skip  # fmt: skip


@pytest.mark.parametrize(("losses", "kind"), [shape[1:] for shape in SHAPES], ids=[shape[0] for shape in SHAPES])
def test_shapes_of_a_loss(losses: Callable[[int], float], kind: str | None) -> None:
    """Every shape of divergence is seen, and what only looks like one is not."""
    found = {name for _, name in watch(DivergingLoss(), [losses(step) for step in range(300)])}
    assert found == set((kind or "").split())


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_a_noisy_heavy_tailed_loss_that_learns_is_no_fault(seed: int) -> None:
    """Student-like noise around a falling loss is no divergence; at most it is looked into."""
    draw = random.Random(seed)

    def noise() -> float:
        return draw.gauss(0, 0.3) / math.sqrt(draw.gammavariate(1.5, 1 / 1.5) + 1e-3)

    found = watch(DivergingLoss(), [2.3 * math.exp(-step / 50) + 0.3 * noise() for step in range(300)])
    assert {kind for _, kind in found} <= {"stuck_loss", "overshoot"}


def test_a_dismissed_suspicion_is_not_raised_again_soon() -> None:
    """After each dismissal the detector is quiet for four times as long, and then looks at every fourth reading."""
    raised = [step for step, _ in looked_into(DivergingLoss(), [2.3] + [2.31] * 399)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(raised)]
    assert gaps[:2] == [28, 100]


def test_a_suspicion_that_was_none_says_nothing_of_others() -> None:
    """A run that does not learn is looked into ever more rarely, and is still seen to explode."""
    losses = [2.3 + 0.01 * (step % 3) if step < 600 else 2.3 * 1.5 ** (step - 600) for step in range(700)]
    raised = looked_into(DivergingLoss(), losses)
    exploded = next(step for step, fault in raised if fault.kind == "exploding_loss")
    before = [fault.kind for step, fault in raised if step < exploded]
    assert set(before) == {"stuck_loss"}
    assert len(before) < 6
    assert 600 < exploded < 620


def test_a_loss_that_was_high_for_good_reasons_may_still_explode() -> None:
    """A suspicion that was none silences its like, and not one of a loss ten times as high."""
    losses = [1.0 if step < 20 else 20.0 + step / 10 if step < 100 else 1e4 * (step - 99) for step in range(200)]
    raised = [step for step, fault in looked_into(DivergingLoss(), losses) if fault.kind == "exploding_loss"]
    assert [step for step in raised if step < 100] == [23, 48]
    assert min(step for step in raised if step >= 100) < 105


def test_a_rise_is_looked_into_however_low_the_loss_is_by_then() -> None:
    """Twelve readings later, whatever else was dismissed in between; until then nothing is certified."""
    detector, raised = DivergingLoss(), []
    for step in range(60):
        one = reading(step, 2.3 if step == 0 else 60.0 if step < 9 else 1e-3)
        limits = detector.limits()
        assert limits is not None
        assert one.loss is not None
        assert (one.loss >= limits.loss) == (step <= 13)
        fault = detector.check(one)
        if fault is not None:
            raised.append((step, fault.kind, fault.since))
            detector.dismiss(one)
        detector.accept(one)
        assert detector.undecided() == (1 <= step < 13)
    assert raised == [(7, "exploding_loss", None), (13, "overshoot", 0)]


@pytest.mark.parametrize(("back_to", "looks"), [(0, []), (3, []), (6, [19])])
def test_a_rise_is_still_looked_into_behind_a_state_that_is_newer(back_to: int, looks: list[int]) -> None:
    """Going back to a state from before the rise is the end of it; one from behind it may be as ruined."""
    detector = DivergingLoss()
    for step in range(7):
        detector.accept(reading(step, 9.0 if step == 4 else 2.3))
    detector.rewind(back_to)
    resumed = DivergingLoss()
    resumed.load_state_dict(detector.state_dict())
    raised = looked_into(resumed, [0.1] * 33, start=7)
    assert [step for step, _ in raised] == looks
    assert all(fault.kind == "overshoot" and "rose to 9 after step 3" in fault.message for _, fault in raised)


def test_a_model_back_at_chance_for_good_reasons_may_still_swing() -> None:
    """What is silenced of one shape hides no other: a loss well above the untrained one's is told."""
    losses = [learning_curve(step) if step < 150 else 2.3 if step < 400 else 6.5 for step in range(500)]
    raised = looked_into(DivergingLoss(), losses)
    assert {fault.kind for _, fault in raised} == {"collapsed", "unsteady_loss"}
    assert 400 < next(step for step, fault in raised if fault.kind == "unsteady_loss") < 450


def test_an_outlier_does_not_set_the_bar() -> None:
    """One reading a thousand times as high neither raises what was dismissed again nor hides what comes after it."""
    losses = [1.0 if step < 16 else 5000.0 if step == 30 else 14.0 if step < 34 else 1500.0 for step in range(60)]
    raised = [step for step, fault in looked_into(DivergingLoss(), losses) if fault.kind == "exploding_loss"]
    assert raised[:2] == [20, 36]


def test_a_loss_that_rises_again_and_again_is_looked_into_ever_more_rarely() -> None:
    """Heavy tails are no fault, and cost next to nothing."""
    losses = [20.0 if step % 20 == 9 else learning_curve(step) for step in range(3000)]
    raised = [kind for _, kind in watch(DivergingLoss(), losses)]
    assert set(raised) == {"overshoot"}
    assert 3 <= len(raised) <= 11


STATE = {
    "losses": [[3, 2.0], [4, 1.5], [5, 9.0]],
    "first": 2.0,
    "first_step": 3,
    "best": 1.75,
    "highest": 9.0,
    "dismissed": {"stuck_loss": [50, 100, 2.0]},
    "since": 3,
    "rise": [4, 9.0, 14],
}


def test_a_checkpoint_of_the_version_before_is_taken_up() -> None:
    """Every key is read and written as it was; one without a rise, or from before rises were kept, has none."""
    detector = DivergingLoss()
    detector.load_state_dict(STATE)
    assert detector.state_dict() == STATE
    assert detector.first == 2.0
    assert detector.undecided()
    detector.load_state_dict({**STATE, "rise": [None, 9.0, 14]})
    assert not detector.undecided()
    detector.load_state_dict({key: value for key, value in STATE.items() if key not in ("rise", "dismissed")})
    assert not detector.undecided()
    assert detector.state_dict()["dismissed"] == {}


def test_a_loss_on_its_way_back_makes_uneasy() -> None:
    """No state is certified where half of what was learned is lost, or the loss is clearly above the untrained one."""
    detector = DivergingLoss()
    assert not detector.uneasy(reading(0, 100.0))
    for step in range(10):
        detector.accept(reading(step, 2.0 if step == 0 else 1.0))
    assert [detector.uneasy(reading(10, loss)) for loss in (1.4, 1.6, 4.1, None)] == [False, True, True, False]
    untrained = DivergingLoss()
    untrained.accept(reading(0, 2.0))
    assert [untrained.uneasy(reading(1, loss)) for loss in (1.9, 3.9, 4.1)] == [False, False, True]


def test_thresholds() -> None:
    """A rise is looked at after as many readings as the threshold says."""
    own = replace(DivergingLossThresholds(), overshoot=OvershootThresholds(above=1.0, after=3))
    losses = [2.0, 2.0, 2.0, 4.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert watch(DivergingLoss(thresholds=own), losses) == [(6, "overshoot")]
    assert watch(DivergingLoss(), losses) == []


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [("factor", 1.0, "a number above 1"), ("patience", 7, "at least 8"), ("warmup", 0, "at least 1")],
)
def test_arguments_are_checked(argument: str, value: float, expected: str) -> None:
    """An argument out of its range is an error that names it."""
    with pytest.raises(ValueError, match=rf"DivergingLoss\({argument}={value}\): expected .*{expected}"):
        DivergingLoss(**{argument: value})
