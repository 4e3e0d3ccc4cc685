"""Having learned, the loss swings, and is on average above the untrained level."""

from __future__ import annotations

from statistics import fmean

from lightning_nanguard.detect.loss_shapes.view import LossView
from lightning_nanguard.thresholds.detection import DivergingLossThresholds
from lightning_nanguard.types import Fault


def unsteady(view: LossView, thresholds: DivergingLossThresholds) -> Fault | None:
    """The fault ``unsteady_loss``, ``None`` where the loss has another shape."""
    own = thresholds.unsteady
    if view.learned <= thresholds.learned * view.unit:
        return None
    recent = view.newest(view.patience)
    if len(recent) < view.patience:
        return None
    # A model that is right on some batches and far off on others has a low median; a trimmed mean shows it.
    usual = fmean(sorted(recent)[: -view.patience // own.trimmed_part])
    if usual <= view.first + own.above * view.unit:
        return None
    message = f"having learned, the loss swings around {usual:.4g}; the untrained model's was {view.first:.4g}"
    return Fault("unsteady_loss", "learner", "loss", usual, message, certain=False, proof="batches")
