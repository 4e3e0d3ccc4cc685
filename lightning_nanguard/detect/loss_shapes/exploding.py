"""The loss is far above the untrained model's, and not falling."""

from __future__ import annotations

from statistics import median

from lightning_nanguard.detect.loss_shapes.view import LossView
from lightning_nanguard.thresholds.detection import DivergingLossThresholds
from lightning_nanguard.types import Fault


def exploding(view: LossView, thresholds: DivergingLossThresholds) -> Fault | None:
    """The fault ``exploding_loss``, ``None`` where the loss has another shape."""
    own = thresholds.exploding
    far = view.first + view.factor * view.unit
    if view.loss <= far:
        return None
    very_far = view.first + own.abrupt_factor * view.factor * view.unit
    last = view.newest(own.abrupt_readings)
    abruptly = len(last) == own.abrupt_readings and min(last) > very_far and last[-1] >= own.abrupt_keeps * last[0]
    if not (abruptly or _steadily(view, far, thresholds)):
        return None
    message = f"the loss is {view.loss:.4g}; the untrained model's was {view.first:.4g}"
    return Fault(
        "exploding_loss",
        "learner",
        "loss",
        view.loss,
        message,
        certain=False,
        clipping_helps=True,
        excess=abs(view.loss - view.first),
    )


def _steadily(view: LossView, far: float, thresholds: DivergingLossThresholds) -> bool:
    own = thresholds.exploding
    recent = view.newest(own.readings)
    if len(recent) < own.readings or median(recent) <= far:
        return False
    half = len(recent) // 2
    return median(recent[half:]) > own.keeps * median(recent[:half])
