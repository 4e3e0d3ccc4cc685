"""A loss that had fallen and swings above the untrained level."""

from __future__ import annotations

import pytest

from lightning_nanguard import Fault
from lightning_nanguard.detect.loss_shapes.unsteady import unsteady
from lightning_nanguard.thresholds.detection import DivergingLossThresholds, UnsteadyThresholds
from tests.detect.loss_shapes.views import view

THRESHOLDS = DivergingLossThresholds()
SWINGS = [0.0, 0.0, 30.0, 0.0] * 10


@pytest.mark.parametrize(
    ("losses", "best", "swings"),
    [
        (SWINGS, 0.5, True),
        (SWINGS, 1.9, False),
        (SWINGS[:39], 0.5, False),
        ([0.5] * 36 + [1e6] * 4, 0.5, False),
    ],
    ids=["swings", "never learned", "too few", "outliers"],
)
def test_unsteady(losses: list[float], best: float, swings: bool) -> None:
    """The mean of all but the highest tenth is clearly above the untrained level."""
    assert (unsteady(view(losses, best=best), THRESHOLDS) is not None) == swings


def test_the_fault() -> None:
    """It is a suspicion of the learner that the newest batches have to confirm."""
    assert unsteady(view(SWINGS, best=0.5), THRESHOLDS) == Fault(
        "unsteady_loss",
        "learner",
        "loss",
        5.0,
        "having learned, the loss swings around 5; the untrained model's was 2",
        certain=False,
        proof="batches",
    )


def test_thresholds() -> None:
    """How far above the untrained level is a threshold."""
    assert unsteady(view(SWINGS, best=0.5), DivergingLossThresholds(unsteady=UnsteadyThresholds(above=2.0))) is None
