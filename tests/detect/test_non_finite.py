"""NonFinite finds what is not finite or overflows."""

from __future__ import annotations

import math

import pytest

from lightning_nanguard import Fault, NonFinite, Reading
from lightning_nanguard.thresholds.detection import NonFiniteThresholds
from tests.detect.readings import reading


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
        (reading(0, 1.0, math.nan, scaler_skips=True, loss_scale=0.5), None),
        (reading(0, math.nan, loss_scale=math.inf), "corrupted_state"),
        (reading(0, math.nan, loss_scale=1e-40), "corrupted_state"),
        (reading(0, math.nan, loss_scale=64.0), "non_finite_loss"),
    ],
)
def test_non_finite(given_reading: Reading, kind: str | None) -> None:
    """What is not finite, or overflows when squared, is a fault; an ordinary fp16 overflow is the scaler's."""
    fault = NonFinite().check(given_reading)
    assert (fault.kind if fault else None) == kind


def test_a_streak_of_overflows_is_a_fault() -> None:
    """Overflows in a row are left to the scaler until there are too many of them."""
    detector = NonFinite(overflow_patience=3)
    detector.accept(reading(0, 1.0, 1.0, loss_scale=128.0))
    overflow = [reading(step, 1.0, math.inf, scaler_skips=True, loss_scale=64.0) for step in (1, 2, 3)]
    for one in overflow[:2]:
        assert detector.check(one) is None
        detector.accept(one)
    fault = detector.check(overflow[2])
    assert fault is not None
    assert (fault.kind, fault.scope) == ("loss_scale_collapse", "learner")


def test_a_scaler_may_search_its_scale() -> None:
    """Before the first update no number of overflows is a fault above the smallest scale; later no small scale is."""
    detector, scale = NonFinite(), 2.0**16
    for step in range(1, 143):
        overflow = reading(step, 1.0, math.inf, scaler_skips=True, loss_scale=scale)
        assert detector.check(overflow) is None
        detector.accept(overflow)
        scale /= 2
    fault = detector.check(reading(143, 1.0, math.inf, scaler_skips=True, loss_scale=scale))
    assert fault is not None
    assert fault.kind == "loss_scale_collapse"
    detector = NonFinite()
    detector.accept(reading(144, 1.0, 1.0, loss_scale=2.0**-19))
    assert detector.check(reading(145, 1.0, math.inf, scaler_skips=True, loss_scale=2.0**-20)) is None
    resumed = NonFinite()
    resumed.load_state_dict(detector.state_dict())
    assert resumed.state_dict() == detector.state_dict()


@pytest.mark.parametrize(("jump", "kind"), [(2.0, None), (16.0, None), (300.0, "corrupted_state")])
def test_a_scale_grows_by_doubling(jump: float, kind: str | None) -> None:
    """A scale that overflows after it has jumped is bad."""
    detector = NonFinite()
    detector.accept(reading(0, 1.0, 1.0, loss_scale=64.0))
    fault = detector.check(reading(1, 1.0, math.inf, scaler_skips=True, loss_scale=64.0 * jump))
    assert (None if fault is None else fault.kind) == kind


def test_traits() -> None:
    """All are certain; clipping helps against each but a loss scale that no scale helps. A loss that alone is infinite
    is not blamed on the learner."""
    detector = NonFinite(min_loss_scale=2.0)
    detector.accept(reading(0, 1.0, 1.0, loss_scale=1.0))
    faults = [
        detector.check(one)
        for one in (
            reading(0, math.inf),
            reading(0, 1.0, math.inf),
            reading(0, 1.0, 1e19),
            reading(0, 1.0, math.inf, scaler_skips=True, loss_scale=1.0),
        )
    ]
    gradient = ("batch", "gradient")
    assert faults == [
        Fault("non_finite_loss", "batch", "loss", math.inf, "the loss is inf", conclusive=True, clipping_helps=True),
        Fault("non_finite_gradient", *gradient, math.inf, "a gradient is not finite", clipping_helps=True),
        Fault(
            "gradient_overflow",
            *gradient,
            1e19,
            "the gradient norm is 1e+19; its square overflows float32, or nearly does",
            clipping_helps=True,
        ),
        Fault(
            "loss_scale_collapse",
            "learner",
            "gradient",
            1.0,
            "fp16 overflows took the loss scale down to 1.0, and the gradient still overflows",
            proof="none",
        ),
    ]


def test_the_largest_norm_is_a_threshold() -> None:
    """It decides in the check and in the limits alike."""
    detector = NonFinite(thresholds=NonFiniteThresholds(max_norm=100.0))
    assert detector.check(reading(0, 1.0, 100.0)) is None
    assert detector.check(reading(0, 1.0, 101.0)) is not None
    assert detector.limits().norm == 100.0


def test_it_judges_line_searches() -> None:
    """A loss that is not finite must not be there even in a further evaluation of one step."""
    assert NonFinite.judges_line_search


@pytest.mark.parametrize(("argument", "value"), [("overflow_patience", 0), ("min_loss_scale", 0.0)])
def test_arguments_are_checked(argument: str, value: float) -> None:
    """An argument out of its range is an error that names it."""
    with pytest.raises(ValueError, match=rf"NonFinite\({argument}={value}\): expected"):
        NonFinite(**{argument: value})
