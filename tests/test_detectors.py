"""Detectors look at readings and say what is wrong; healthy oddities are no fault."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_nanguard import Detector, DivergingLoss, Fault, GradientSpike, NonFinite, Reading
from lightning_nanguard.detect.base import AT_ONCE, check
from lightning_nanguard.detect.defaults import default_detectors
from lightning_nanguard.detect.history import ReadingHistory
from lightning_nanguard.detect.monitors import Monitors
from lightning_nanguard.detect.window import Window, spread


def reading(step: int, loss: float | None = 1.0, norm: float | None = 1.0, **more: object) -> Reading:
    loss_finite = loss is None or math.isfinite(loss)
    finite = loss_finite and (norm is None or math.isfinite(norm))
    return Reading(**{"step": step, "optimizer_index": 0, "loss": loss, "grad_norm": norm, "finite": finite,
                      "loss_finite": loss_finite, **more})  # fmt: skip


def watch(detector: Detector, losses: Iterable[float], norm: float = 1.0) -> list[tuple[int, str]]:
    """The faults in a run of losses; what is no fault is accepted, and so are rises, which the weights decide on."""
    faults = []
    for step, loss in enumerate(losses):
        one = reading(step, loss, norm)
        fault = detector.check(one)
        if fault is not None:
            faults.append((step, fault.kind))
        if fault is not None and fault.kind == "overshoot":
            detector.dismiss(one)
        if fault is None or fault.kind == "overshoot":
            detector.accept(one)
    return faults


def looked_into(detector: Detector, losses: Iterable[float], start: int = 0) -> list[tuple[int, Fault]]:
    """The faults in a run of losses of which each is looked into and is none."""
    faults = []
    for step, loss in enumerate(losses, start):
        one = reading(step, loss)
        fault = detector.check(one)
        if fault is not None:
            faults.append((step, fault))
            detector.dismiss(one)
        detector.accept(one)
    return faults


@pytest.mark.parametrize(
    ("given_reading", "kind"),
    [
        (reading(0, math.nan), "non_finite_loss"),
        (reading(0, math.inf), "non_finite_loss"),
        (reading(0, 1.0, math.nan), "non_finite_gradient"),
        (reading(0, None, math.inf), "non_finite_gradient"),
        (reading(0, 1.0, 1e25), "gradient_overflow"),
        (reading(0, -3.0, 0.0), None),
        (reading(0, 1e30, 1e17), None),
        (reading(0, 1.0, math.nan, scaler_skips=True, loss_scale=1024.0), None),
        (reading(0, 1.0, math.nan, scaler_skips=True, loss_scale=0.5), "loss_scale_collapse"),
    ],
)
def test_non_finite(given_reading: Reading, kind: str | None) -> None:
    """What is not finite, or overflows when squared, is a fault; an ordinary fp16 overflow is the scaler's."""
    fault = NonFinite().check(given_reading)
    assert (fault.kind if fault else None) == kind


def test_a_streak_of_overflows_is_a_fault() -> None:
    """Overflows in a row are left to the scaler until there are too many of them."""
    detector = NonFinite(overflow_patience=3)
    overflow = [reading(step, 1.0, math.inf, scaler_skips=True, loss_scale=64.0) for step in range(3)]
    for one in overflow[:2]:
        assert detector.check(one) is None
        detector.accept(one)
    fault = detector.check(overflow[2])
    assert fault is not None
    assert (fault.kind, fault.scope) == ("loss_scale_collapse", "learner")


def test_a_spike_stands_out_and_does_not_enter_the_window() -> None:
    """A norm a thousand times the usual is a fault, and as much of one the next time."""
    detector = GradientSpike()
    for step in range(40):
        assert detector.check(reading(step, norm=1 + 0.1 * (step % 3))) is None
        detector.accept(reading(step, norm=1 + 0.1 * (step % 3)))
    for step in (40, 41):
        fault = detector.check(reading(step, norm=1000.0))
        assert fault is not None
        assert fault.kind == "gradient_spike"
    assert detector.check(reading(42, norm=5.0)) is None


def test_what_the_untrained_model_took_is_no_spike() -> None:
    """Where the loss has come down to nothing and the data change, gradients are as they were at the start; what lies
    far above that is a spike all the same."""
    detector = GradientSpike()
    for step in range(300):
        detector.accept(reading(step, norm=8.0 * 0.8**step + 1e-8))
    assert detector.check(reading(300, norm=9.0)) is None
    assert detector.check(reading(300, norm=900.0)) is not None


def test_no_spike_during_warmup() -> None:
    """Before the warm-up is over a finite norm that stands out is a fault only if its batch is strange too."""
    detector = GradientSpike(warmup=20)
    for step in range(19):
        detector.accept(reading(step, norm=1.0))
    fault = detector.check(reading(19, norm=1e5))
    assert fault is not None
    assert fault.doubtful
    assert detector.check(reading(19, norm=9.0)) is None


@given(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 1.5, 2.0]))
@settings(max_examples=30, deadline=None)
def test_heavy_tailed_norms_are_no_spikes(seed: int, sigma: float) -> None:
    """Log-normal norms, as of small batches with heavy tails, never trip the detector."""
    draw = random.Random(seed)
    detector = GradientSpike()
    for step in range(400):
        one = reading(step, norm=math.exp(draw.gauss(0, sigma)))
        fault = detector.check(one)
        assert fault is None or fault.doubtful
        detector.accept(one)


def _falling(step: int) -> float:
    return 2.3 * math.exp(-step / 60)


SHAPES: list[tuple[str, Callable[[int], float], str | None]] = [
    ("falling", _falling, None),
    ("exploding", lambda step: 2.3 * 1.3 ** max(0, step - 20), "exploding_loss"),
    ("exploded at once", lambda step: 2.3 if step < 5 else 1e6 * (1 + step), "exploding_loss"),
    ("back at chance", lambda step: _falling(step) if step < 150 else 2.3, "collapsed"),
    ("never learned after a climb", lambda step: 2.3 if step == 0 else 6.0 if step < 10 else 2.31, "stuck_loss"),
    ("far up at first, and learning since", lambda step: 15.0 if 0 < step < 4 else _falling(step), "overshoot"),
    ("a jump that falls again", lambda step: _falling(step) + (step > 100) * 40 * math.exp((100 - step) / 5),
     "overshoot"),
    ("a lower one", lambda step: _falling(step) + (step > 100) * 4 * math.exp((100 - step) / 5), None),
    ("right on some, far off on others", lambda step: _falling(step) + (step > 150 and step % 3 == 0) * 20,
     "unsteady_loss overshoot"),
    ("at rest at chance, below a poor start", lambda step: max(2.3, 3.9 - 0.2 * step), "stuck_loss"),
    ("negative", lambda step: -step / 10, None),
    ("a policy gradient's: from 0 down, and most of the way back",
     lambda step: -0.01 - min(3.0, step / 20) + 0.03 * min(80, max(0, step - 60)), None),
    ("zero", lambda step: 0.0, None),
    ("harder data from the middle on", lambda step: _falling(step) + (0.9 if step > 100 else 0), None),
]  # fmt: skip


@pytest.mark.parametrize(("losses", "kind"), [shape[1:] for shape in SHAPES], ids=[shape[0] for shape in SHAPES])
def test_shapes_of_a_loss(losses: Callable[[int], float], kind: str | None) -> None:
    """Every shape of divergence is seen, and what only looks like one is not."""
    found = {name for _, name in watch(DivergingLoss(), [losses(step) for step in range(300)])}
    assert found == set((kind or "").split())


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
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
    losses = [_falling(step) if step < 150 else 2.3 if step < 400 else 6.5 for step in range(500)]
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
    losses = [20.0 if step % 20 == 9 else _falling(step) for step in range(3000)]
    raised = [kind for _, kind in watch(DivergingLoss(), losses)]
    assert set(raised) == {"overshoot"}
    assert 3 <= len(raised) <= 11


@pytest.mark.parametrize("detector", default_detectors(), ids=lambda detector: type(detector).__name__)
def test_a_history_survives_a_checkpoint(detector: Detector) -> None:
    """A detector that took up another's state judges as that one does, and its state is plain."""
    draw = random.Random(7)
    for step in range(60):
        detector.accept(reading(step, 2.3 - step / 40 + draw.random(), 1 + draw.random()))
    other = type(detector)()
    other.load_state_dict(detector.state_dict())
    for loss, norm in [(1.0, 1.0), (1e9, 1e3), (math.nan, 1.0), (2.3, 1e20)]:
        assert detector.check(reading(60, loss, norm)) == other.check(reading(60, loss, norm))
    assert other.state_dict() == detector.state_dict()


def test_a_rewound_window_forgets_what_came_after() -> None:
    """Going back to a step forgets what was accepted after it."""
    window = Window(4)
    for step in range(6):
        window.append(step, float(step))
    window.rewind(4)
    assert window.values() == [2.0, 3.0, 4.0]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(-1e3, 1e3))
def test_spread_does_not_depend_on_where_the_values_lie(values: list[float], shift: float) -> None:
    """The spread of shifted values is that of the values."""
    assert spread([value + shift for value in values]) == pytest.approx(spread(values), abs=1e-6)


def test_a_climb_before_a_fault_is_seen() -> None:
    """A trend that leaves its range upwards counts as climbing; noise does not."""
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
    trend = ReadingHistory()
    for step, loss in enumerate(losses):
        trend.accept(reading(step, loss, 1.0))
    assert trend.falling() is falling


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
    trend = ReadingHistory()
    for step, norm in enumerate(norms):
        trend.accept(reading(step, 1.0, norm))
    assert trend.burst() is came_out_of_nothing


def until_found(streams: Monitors, losses: Iterable[float], norms: Iterable[float], wanders: bool) -> list[str]:
    """Kinds of the faults that are acted on, when what is no fault is accepted."""
    found = []
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        seen = reading(step, loss, norm)
        fault = streams.check(seen, wanders=wanders)
        if fault is None or fault.doubtful:
            streams.accept(seen)
        else:
            found.append(fault.kind)
    return found


@pytest.mark.parametrize("steps", [20, 46])
def test_one_that_wanders_may_come_back(steps: int) -> None:
    """A loss far off and back again is a fault, but not of an optimizer that wanders."""
    losses = [1.0, 0.8, 0.5, 0.3] + [0.2] * 36 + [1e4] * steps + [0.2] * 40
    norms = [1.0] * 40 + [1e5] * steps + [1.0] * 40
    assert until_found(Monitors(default_detectors()), losses, norms, wanders=False)
    assert not until_found(Monitors(default_detectors()), losses, norms, wanders=True)


def test_one_that_wanders_may_have_left() -> None:
    """A loss that stays far off is a fault of any optimizer; so is what is not finite, at once."""
    far = [1.0] * 40 + [1e4] * 80
    assert "overshoot" not in until_found(Monitors(default_detectors()), far, far, wanders=True)
    assert "exploding_loss" in until_found(Monitors(default_detectors()), far, far, wanders=True)
    assert until_found(Monitors(default_detectors()), [1.0, math.nan], [1.0, 1.0], wanders=True) == ["non_finite_loss"]
    assert until_found(Monitors(default_detectors()), [1.0, 1.0], [1.0, 1e20], wanders=True) == ["gradient_overflow"]


def test_one_that_wanders_is_still_asked_about_its_batch() -> None:
    """A finite gradient spike is then in doubt: it counts where the batch is strange."""
    streams = Monitors(default_detectors())
    until_found(streams, [1.0] * 40, [1.0] * 40, wanders=True)
    fault = streams.check(reading(40, 1.0, 1e6), wanders=True)
    assert fault is not None
    assert fault.kind == "gradient_spike"
    assert fault.doubtful


@pytest.mark.parametrize(
    ("norms", "found"),
    [
        ([1e14, 2.0, 3.0], True),
        ([1e14, 1e13, 1e12], False),
        ([1e5, 0.1, 0.1], False),
        ([3.0, 2.0, 1e14], False),
    ],
)
def test_the_first_batch_is_told_by_those_behind_it(norms: list[float], found: bool) -> None:
    """A first gradient absurdly larger than the two behind it has spoilt weights and moments."""
    detector = GradientSpike()
    for step, norm in enumerate(norms[:2]):
        assert detector.check(reading(step, 1.0, norm)) is None
        detector.accept(reading(step, 1.0, norm))
    fault = detector.check(reading(2, 1.0, norms[2]))
    assert (fault is not None and fault.scope == "state") == found


def test_the_untrained_loss_is_read_again_from_the_start() -> None:
    """Where all was rewound, the next loss is the untrained model's."""
    trend, detector = ReadingHistory(), DivergingLoss()
    for one in (trend, detector):
        one.accept(reading(1, 1e28))
        one.accept(reading(2, 5.0))
        one.rewind(1)
        one.accept(reading(3, 6.0))
    assert trend.first == detector.first == 1e28
    for one in (trend, detector):
        one.rewind(0)
    assert trend.first == detector.first == 1e28
    for one in (trend, detector):
        one.accept(reading(4, 7.0))
        one.accept(reading(5, 6.0))
    assert trend.first == detector.first == 7.0


def one_by_one(detectors: Sequence[Detector], readings: Iterable[Reading]) -> list[tuple[int, str]]:
    """Faults when every detector looks at every reading and takes it at once."""
    found = []
    for seen in readings:
        fault = check(detectors, seen)
        if fault is None:
            for detector in detectors:
                detector.accept(seen)
        else:
            found.append((seen.step, fault.kind))
    return found


def some_at_a_time(detectors: Sequence[Detector], readings: Iterable[Reading]) -> list[tuple[int, str]]:
    """Faults when what lies below the detectors' limits is taken some at a time."""
    streams, found = Monitors(detectors), []
    for seen in readings:
        fault = streams.check(seen)
        if fault is None:
            streams.accept(seen)
        else:
            found.append((seen.step, fault.kind))
    return found


@given(st.lists(st.floats(-14, 30), min_size=1, max_size=120), st.integers(0, 2**16))
@settings(max_examples=200, deadline=None)
def test_limits_hide_no_spike(exponents: list[float], seed: int) -> None:
    """However norms jump about, limits change nothing about which of them are faults."""
    draw = random.Random(seed)
    norms = [math.exp(x) if draw.random() < 0.3 else 1 + draw.random() for x in exponents]
    readings = [reading(step, 0.5, norm) for step, norm in enumerate(norms)]
    assert some_at_a_time([NonFinite(), GradientSpike()], readings) == one_by_one(
        [NonFinite(), GradientSpike()], readings
    )


@given(st.integers(5, 90), st.floats(0.02, 0.9), st.floats(1.0, 1e4), st.integers(0, 2**16))
@settings(max_examples=100, deadline=None)
def test_limits_hide_no_divergence(left_at: int, learned: float, level: float, seed: int) -> None:
    """A loss that leaves is found at the same reading, or some later where it lay about the limit."""
    draw = random.Random(seed)
    losses = [1 - learned * min(1, step / 30) if step < left_at else level for step in range(200)]
    readings = [reading(step, loss * (1 + 0.05 * draw.random())) for step, loss in enumerate(losses)]
    alone = one_by_one([DivergingLoss()], readings)
    together = some_at_a_time([DivergingLoss()], readings)
    assert bool(alone) == bool(together)
    if alone:
        assert 0 <= together[0][0] - alone[0][0] <= AT_ONCE


def test_a_detector_without_limits_sees_every_reading() -> None:
    """A detector of a user's own is asked about each reading, and given each before the next."""

    class Counting(Detector):
        def __init__(self) -> None:
            self.seen, self.taken = 0, 0

        def check(self, reading: Reading) -> None:
            assert self.taken == reading.step
            self.seen += 1

        def accept(self, reading: Reading) -> None:
            self.taken += 1

        def state_dict(self) -> dict[str, int]:
            return {"seen": self.seen}

    streams = Monitors([NonFinite(), Counting()])
    for step in range(20):
        streams.check(reading(step))
        streams.accept(reading(step))
    assert streams.state_dict()["0"]["detectors"][1] == [Counting.__qualname__, {"seen": 20}]


def test_the_level_of_a_loss_is_no_median() -> None:
    """A ruined model that is right on most batches and far off on the others is at no low level."""
    trend, usual = ReadingHistory(), ReadingHistory()
    for step, loss in enumerate([0.0, 0.0, 0.0, 15.0, 2.5, 0.0, 13.0, 0.0]):
        trend.accept(reading(step, loss, 1.0))
        usual.accept(reading(step, 2.0 + 0.01 * step, 1.0))
    level, steady = trend.level(), usual.level()
    assert level is not None
    assert level > 2.0
    assert steady == pytest.approx(2.03)


def test_norms_of_a_saturated_model_are_not_usual() -> None:
    """Where a rate has saturated all units, the gradient to clip at is that of a model that still learns."""
    trend = ReadingHistory()
    for step in range(30):
        trend.accept(reading(step, 1.0, 3.0 if step == 0 else 1e-30))
    assert trend.usual_norm() == pytest.approx(0.03)
    resumed = ReadingHistory()
    resumed.load_state_dict(trend.state_dict())
    assert resumed.usual_norm() == trend.usual_norm()


def test_limits_do_not_depend_on_when_somebody_asks() -> None:
    """Ranks that ask for a trend at different times judge every reading alike."""
    losses = [1.0] + [0.5] * 1010 + [5.0] * 40 + [0.1] * 5 + [0.6] * 20
    one, other = Monitors(default_detectors()), Monitors(default_detectors())
    for step, loss in enumerate(losses):
        seen = reading(step, loss)
        assert one.check(seen) == other.check(seen), step
        one.accept(seen)
        other.accept(seen)
        if loss == 0.1:
            one.history(0)
