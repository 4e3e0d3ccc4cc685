"""The detectors used if the user lists none."""

from __future__ import annotations

from lightning_nanguard.detect.base import Detector
from lightning_nanguard.detect.diverging_loss import DivergingLoss
from lightning_nanguard.detect.gradient_spike import GradientSpike
from lightning_nanguard.detect.non_finite import NonFinite
from lightning_nanguard.thresholds.detection import DetectionThresholds


def default_detectors(thresholds: DetectionThresholds = DetectionThresholds()) -> tuple[Detector, ...]:
    """The detectors of ``NaNGuard(detectors=None)``, in the order in which they check readings.

    Args:
        thresholds: When a reading counts as a fault.
    """
    return (
        NonFinite(thresholds=thresholds.non_finite),
        GradientSpike(thresholds=thresholds.gradient_spike),
        DivergingLoss(thresholds=thresholds.diverging_loss),
    )
