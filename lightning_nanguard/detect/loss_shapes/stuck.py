"""Early in training the loss stays above the untrained model's, or stops falling near it."""

from __future__ import annotations

from statistics import median

from lightning_nanguard.detect.loss_shapes.view import LossView
from lightning_nanguard.detect.robust_statistics import falling, spread
from lightning_nanguard.thresholds.detection import DivergingLossThresholds
from lightning_nanguard.types import Fault


def stuck(view: LossView, thresholds: DivergingLossThresholds) -> Fault | None:
    """The fault ``stuck_loss``, ``None`` where the loss has another shape."""
    own = thresholds.stuck
    if not own.min_updates <= view.since <= own.max_updates or view.since % own.every:
        return None
    recent = view.newest(own.readings)
    if len(recent) < own.min_readings:
        return None
    level = median(recent)
    learned = view.learned > thresholds.learned * view.unit
    high = not learned and min(recent) > view.first + own.above * view.unit
    no_better = not learned and view.since >= view.patience and level > view.first - thresholds.learned * view.unit
    if not (high or no_better or _at_rest(view, thresholds)):
        return None
    climb = f" and a climb to {view.highest:.4g}" if view.highest is not None else ""
    message = (
        f"after {view.since} updates{climb} the loss is {level:.4g}, no better than the untrained model's "
        f"{view.first:.4g}"
    )
    return Fault("stuck_loss", "learner", "loss", level, message, certain=False, recovers=True, proof="trial")


def _at_rest(view: LossView, thresholds: DivergingLossThresholds) -> bool:
    if view.since < view.patience or view.best < view.first - thresholds.stuck.at_rest * view.unit:
        return False
    recent = view.newest(view.patience)
    return not falling(recent, spread(recent), thresholds.falling)
