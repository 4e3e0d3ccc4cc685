"""The detectors used where the user lists none."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from lightning_nanguard import Detector, DivergingLoss, GradientSpike, NonFinite
from lightning_nanguard.detect.defaults import default_detectors
from lightning_nanguard.thresholds.detection import DetectionThresholds, NonFiniteThresholds
from tests.detect.readings import reading


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


def test_order_and_thresholds() -> None:
    """What is not finite is looked for first; each detector gets its thresholds."""
    thresholds = replace(DetectionThresholds(), non_finite=NonFiniteThresholds(max_norm=7.0))
    detectors = default_detectors(thresholds)
    assert [type(detector) for detector in detectors] == [NonFinite, GradientSpike, DivergingLoss]
    assert detectors[0].check(reading(0, norm=8.0)) is not None
    assert default_detectors()[0].check(reading(0, norm=8.0)) is None
