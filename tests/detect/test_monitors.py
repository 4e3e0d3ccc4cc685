"""Each optimizer has detectors and a history of its own; limits change nothing about what is found."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_nanguard import Detector, DivergingLoss, Fault, GradientSpike, NonFinite, Reading
from lightning_nanguard.detect.defaults import default_detectors
from lightning_nanguard.detect.monitors import Monitors
from lightning_nanguard.thresholds.detection import DetectionThresholds, HistoryThresholds
from tests.detect.readings import reading


def until_found(monitors: Monitors, losses: Iterable[float], norms: Iterable[float], quasi_newton: bool) -> list[str]:
    """Kinds of the faults that are acted on, when what is no fault is accepted."""
    found = []
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        seen = reading(step, loss, norm)
        fault = monitors.check(seen, quasi_newton=quasi_newton)
        if fault is None or fault.doubtful:
            monitors.accept(seen)
        else:
            found.append(fault.kind)
    return found


def test_what_is_not_finite_is_a_fault_of_any_optimizer() -> None:
    """A quasi-Newton optimizer is told of it at once."""
    bad = (([1.0, math.nan], [1.0, 1.0], "non_finite_loss"), ([1.0, 1.0], [1.0, 1e20], "gradient_overflow"))
    for losses, norms, kind in bad:
        assert until_found(Monitors(default_detectors()), losses, norms, quasi_newton=True) == [kind]


def test_a_quasi_newton_optimizer_is_still_asked_about_its_batch() -> None:
    """A finite gradient spike is then in doubt: it counts where the batch is strange."""
    monitors = Monitors(default_detectors())
    until_found(monitors, [1.0] * 40, [1.0] * 40, quasi_newton=True)
    fault = monitors.check(reading(40, 1.0, 1e6), quasi_newton=True)
    assert fault is not None
    assert fault.kind == "gradient_spike"
    assert fault.doubtful


def one_by_one(detectors: Sequence[Detector], readings: Iterable[Reading]) -> list[tuple[int, str]]:
    """Faults when every detector looks at every reading and takes it at once."""
    found = []
    for seen in readings:
        fault = next((fault for detector in detectors if (fault := detector.check(seen)) is not None), None)
        if fault is None:
            for detector in detectors:
                detector.accept(seen)
        else:
            found.append((seen.step, fault.kind))
    return found


def some_at_a_time(detectors: Sequence[Detector], readings: Iterable[Reading]) -> list[tuple[int, str]]:
    """Faults when what lies below the detectors' limits is taken some at a time."""
    monitors, found = Monitors(detectors), []
    for seen in readings:
        fault = monitors.check(seen)
        if fault is None:
            monitors.accept(seen)
        else:
            found.append((seen.step, fault.kind))
    return found


@given(st.lists(st.floats(-14, 30), min_size=1, max_size=120), st.integers(0, 2**16), st.sampled_from([4, 12, 128]))
@settings(max_examples=300)
def test_limits_hide_no_spike(exponents: list[float], seed: int, window: int) -> None:
    """However norms jump about, limits change nothing about which of them are faults."""
    detectors = [NonFinite(), GradientSpike(window=window, warmup=min(window, 20))]
    draw = random.Random(seed)
    norms = [math.exp(x) if draw.random() < 0.3 else 1 + draw.random() for x in exponents]
    readings = [reading(step, 0.5, norm) for step, norm in enumerate(norms)]
    assert some_at_a_time(detectors, readings) == one_by_one(detectors, readings)


def test_a_short_window_hides_no_spike() -> None:
    """Limits do not outlast the norms that they follow from."""
    norms = [1.0] * 47 + [40.0] + [1.0] * 6 + [200.0]
    readings = [reading(step, 0.5, norm) for step, norm in enumerate(norms)]
    assert some_at_a_time([GradientSpike(window=4, warmup=4)], readings) == [(54, "gradient_spike")]


@given(st.integers(5, 90), st.floats(0.02, 0.9), st.floats(1.0, 1e4))
@settings(max_examples=100)
def test_limits_hide_no_question(left_at: int, learned: float, level: float) -> None:
    """DivergingLoss asks at the same readings, whether it looks at each or only above its limits."""
    losses = [1 - learned * min(1, step / 30) if step < left_at else level for step in range(200)]
    readings = [reading(step, loss) for step, loss in enumerate(losses)]
    assert some_at_a_time([DivergingLoss()], readings) == one_by_one([DivergingLoss()], readings)


def test_a_detector_without_limits_sees_every_reading() -> None:
    """A detector of a user's own is asked about each reading, and given each before the next."""

    class Counting(Detector):
        def __init__(self) -> None:
            self.seen: list[tuple[int, int]] = []
            self.taken = 0

        def check(self, reading: Reading) -> None:
            self.seen.append((reading.step, self.taken))

        def accept(self, reading: Reading) -> None:
            self.taken += 1

        def state_dict(self) -> dict[str, Any]:
            return {"seen": self.seen}

    prototype = Counting()
    monitors = Monitors([NonFinite(), prototype])
    for step in range(20):
        monitors.check(reading(step))
        monitors.accept(reading(step))
    state = {"seen": [(step, step) for step in range(20)]}
    assert monitors.state_dict()["0"]["detectors"][1] == [Counting.__qualname__, state]
    assert not prototype.seen


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


class Suspects(Detector):
    """Finds a fault in every reading."""

    def __init__(self, **fault: Any) -> None:
        self.fault = Fault(**{"kind": "own_kind", "scope": "learner", "place": "loss", **fault})

    def check(self, reading: Reading) -> Fault | None:
        return self.fault


@pytest.mark.parametrize(
    ("fault", "doubtful"),
    [
        ({"scope": "batch", "certain": False}, True),
        ({"scope": "batch"}, False),
        ({"certain": False}, False),
    ],
    ids=["finite spike", "certain", "loss"],
)
def test_traits_decide_about_a_quasi_newton_optimizer(fault: dict[str, Any], doubtful: bool) -> None:
    """A fault of a user's own kind is treated by its traits alone: in doubt or told."""
    found = Monitors([Suspects(**fault)]).check(reading(0), quasi_newton=True)
    assert found is not None
    assert found.doubtful == doubtful


def test_a_line_search_is_judged_by_those_that_say_so() -> None:
    """A further evaluation of one step is shown only to detectors that judge such ones, a user's own among them."""

    class Judging(Suspects):
        judges_line_search: ClassVar[bool] = True

    both = Monitors([Suspects(), Judging(place="weights")])
    assert both.check(reading(0)) == Fault("own_kind", "learner", "loss")
    assert both.check(reading(0), line_search=True) == Fault("own_kind", "learner", "weights")
    default = Monitors(default_detectors())
    assert default.check(reading(0, math.nan), line_search=True) is not None
    assert Monitors([Suspects()]).check(reading(0), line_search=True) is None


def test_thresholds() -> None:
    """What the histories keep is a threshold."""
    thresholds = DetectionThresholds(history=HistoryThresholds(readings=8))
    monitors = Monitors([], thresholds)
    monitors.check(reading(0))
    for step in range(10):
        monitors.accept(reading(step, float(step)))
    history = monitors.history(0)
    assert history.losses() == [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]


def test_each_optimizer_has_a_history_of_its_own() -> None:
    """Readings of one optimizer say nothing of another; what is asked of all takes the worst."""
    monitors = Monitors(default_detectors())
    assert (monitors.history(0).first, monitors.dismiss(reading(0)), monitors.loss_unit()) == (None, False, 0.0)
    for step in range(20):
        for one in (reading(step, 1.0 - 0.04 * step), reading(step, 5.0, optimizer_index=1)):
            if not monitors.passes(one):
                assert monitors.check(one) is None
                monitors.accept(one)
    assert monitors.loss_unit() == pytest.approx(0.48)
    assert not monitors.learning()
    monitors.accept(reading(20, 0.9))
    assert monitors.uneasy([reading(21, 0.9)])
    assert not monitors.uneasy([reading(21, 0.4), reading(20, 5.0, optimizer_index=1)])
    resumed = Monitors(default_detectors())
    resumed.load_state_dict(monitors.state_dict())
    assert resumed.state_dict() == monitors.state_dict()
    assert list(resumed.state_dict()["0"]) == ["trend", "detectors", "taken", "limits"]
    assert [name for name, _ in resumed.state_dict()["1"]["detectors"]] == [
        "NonFinite",
        "GradientSpike",
        "DivergingLoss",
    ]
