"""The detectors used where the user lists none."""

from __future__ import annotations

from lightning_nanguard.detect.base import Detector
from lightning_nanguard.detect.diverging_loss import DivergingLoss
from lightning_nanguard.detect.gradient_spike import GradientSpike
from lightning_nanguard.detect.non_finite import NonFinite


def default_detectors() -> tuple[Detector, ...]:
    """What ``NaNGuard(detectors=None)`` uses, in the order they are asked."""
    return (NonFinite(), GradientSpike(), DivergingLoss())
