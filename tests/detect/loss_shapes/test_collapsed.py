"""A loss that had fallen and is back at the untrained level."""

from __future__ import annotations

import pytest

from lightning_nanguard import Fault
from lightning_nanguard.detect.loss_shapes.collapsed import collapsed
from lightning_nanguard.thresholds.detection import CollapsedThresholds, DivergingLossThresholds
from tests.detect.loss_shapes.views import view

THRESHOLDS = DivergingLossThresholds()


@pytest.mark.parametrize(
    ("losses", "best", "falls_back"),
    [
        ([0.5] * 30 + [2.0] * 12, 0.5, True),
        ([0.5] * 30 + [2.0] * 11, 0.5, False),
        ([0.5] * 30 + [2.0] * 12, 1.9, False),
        ([0.5] * 30 + [9.0] * 6 + [3.0] * 6, 0.5, False),
        ([0.5] * 5 + [1.5] * 40, 0.5, True),
        ([0.5] * 5 + [1.3] * 40, 0.5, False),
        ([-9.0] * 5 + [0.0] * 40, -9.0, False),
    ],
    ids=["gone", "too few", "never learned", "coming back", "settled", "settled below", "no floor"],
)
def test_collapsed(losses: list[float], best: float, falls_back: bool) -> None:
    """At the untrained level for some readings and staying, or at rest near it for longer."""
    assert (collapsed(view(losses, best=best), THRESHOLDS) is not None) == falls_back


def test_the_fault() -> None:
    """It is a suspicion of the learner, and the loss may come back by itself."""
    assert collapsed(view([0.5] * 30 + [2.0] * 12, best=0.5), THRESHOLDS) == Fault(
        "collapsed",
        "learner",
        "loss",
        2.0,
        "the loss had come down from 2 to 0.5 and is back at 2",
        certain=False,
        recovers=True,
    )


def test_thresholds() -> None:
    """How many readings it takes is a threshold."""
    own = DivergingLossThresholds(collapsed=CollapsedThresholds(readings=6))
    assert collapsed(view([0.5] * 30 + [2.0] * 6, best=0.5), own) is not None
