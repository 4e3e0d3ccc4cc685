"""GradientSpike finds norms far outside everything accepted so far; healthy oddities are no spikes."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_nanguard import GradientSpike
from lightning_nanguard.thresholds.detection import SpikeThresholds
from tests.detect.readings import reading


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
@settings(max_examples=30)
def test_heavy_tailed_norms_are_no_spikes(seed: int, sigma: float) -> None:
    """Log-normal norms, as of small batches with heavy tails, never trip the detector."""
    draw = random.Random(seed)
    detector = GradientSpike()
    for step in range(400):
        one = reading(step, norm=math.exp(draw.gauss(0, sigma)))
        fault = detector.check(one)
        assert fault is None or fault.doubtful
        detector.accept(one)


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


@pytest.mark.parametrize(
    ("before", "norm", "scope", "doubtful"),
    [([1.0] * 40, 1e4, "batch", False), ([1.0] * 10, 1e4, "batch", True), ([1e14, 2.0], 3.0, "state", False)],
    ids=["settled", "warm-up", "first batch"],
)
def test_traits(before: list[float], norm: float, scope: str, doubtful: bool) -> None:
    """A finite spike is a suspicion that clipping helps against, whatever its scope."""
    detector = GradientSpike()
    for step, one in enumerate(before):
        detector.accept(reading(step, norm=one))
    fault = detector.check(reading(len(before), norm=norm))
    assert fault is not None
    assert (fault.scope, fault.doubtful) == (scope, doubtful)
    assert (fault.certain, fault.clipping_helps) == (False, True)


@pytest.mark.parametrize(
    ("changed", "least"),
    [({}, 200.0), ({"above_largest": 1e3}, 1e3), ({"above_first": 4e3}, 4e3), ({"min_deviation": 1.0}, math.exp(12))],
)
def test_thresholds(changed: dict[str, float], least: float) -> None:
    """Each condition of a spike is a threshold: here the norms are all 1, and only the strictest condition decides."""
    detector = GradientSpike(thresholds=replace(SpikeThresholds(), **changed))
    for step in range(40):
        detector.accept(reading(step, norm=1.0))
    assert detector.check(reading(40, norm=0.99 * least)) is None
    assert detector.check(reading(40, norm=1.01 * least)) is not None


@pytest.mark.parametrize(("argument", "value"), [("threshold", 0.0), ("ratio", 1.0), ("window", 5)])
def test_arguments_are_checked(argument: str, value: float) -> None:
    """An argument out of its range is an error that names it."""
    with pytest.raises(ValueError, match=rf"GradientSpike\({argument}={value}\): expected"):
        GradientSpike(**{argument: value})
