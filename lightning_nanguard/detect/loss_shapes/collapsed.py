"""Having learned, the loss is back at the untrained level and stays there."""

from __future__ import annotations

from statistics import median

from lightning_nanguard.detect.loss_shapes.view import LossView
from lightning_nanguard.detect.robust_statistics import falling, spread
from lightning_nanguard.thresholds.detection import DivergingLossThresholds
from lightning_nanguard.types import Fault


def collapsed(view: LossView, thresholds: DivergingLossThresholds) -> Fault | None:
    """The fault ``collapsed``, ``None`` where the loss has another shape."""
    own = thresholds.collapsed
    if view.learned <= thresholds.learned * view.unit or len(view.accepted) < own.readings:
        return None
    recent = view.newest(view.patience)
    last = recent[-own.readings :]
    gone = _gone(view, last, thresholds)
    level = median(last if gone else recent)
    if not (gone or _settled_back(view, recent, level, thresholds)):
        return None
    message = f"the loss had come down from {view.first:.4g} to {view.best:.4g} and is back at {level:.4g}"
    return Fault("collapsed", "learner", "loss", level, message, certain=False, recovers=True)


def _gone(view: LossView, last: list[float], thresholds: DivergingLossThresholds) -> bool:
    # Each of the newest losses is at the untrained level or above it, and they are not falling again.
    own = thresholds.collapsed
    half = own.readings // 2
    above = len(last) == own.readings and min(last) > view.first - own.near_untrained * view.learned
    return above and median(last[half:]) - view.best > own.keeps * (median(last[:half]) - view.best)


def _settled_back(view: LossView, recent: list[float], level: float, thresholds: DivergingLossThresholds) -> bool:
    # The loss no longer falls, and most of what was learned is lost.
    own = thresholds.collapsed
    noise = spread(recent) if len(recent) >= own.noise_readings else 0.0
    settled = len(recent) == view.patience and not falling(recent, noise, thresholds.falling)
    measures_progress = view.learned <= own.max_learned * view.unit
    return (
        settled
        and measures_progress
        and level > view.best + own.settled_share * view.learned
        and level > view.best + own.settled_noise * noise
    )
