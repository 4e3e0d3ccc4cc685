"""A loss that never got below the untrained model's."""

from __future__ import annotations

import pytest

from lightning_nanguard import Fault
from lightning_nanguard.detect.loss_shapes.stuck import stuck
from lightning_nanguard.thresholds.detection import DivergingLossThresholds, StuckThresholds
from tests.detect.loss_shapes.views import view

THRESHOLDS = DivergingLossThresholds()


@pytest.mark.parametrize(
    ("losses", "best", "since", "is_stuck"),
    [
        ([3.1] * 17, 2.0, 16, True),
        ([2.9] * 17, 2.0, 16, False),
        ([3.1] * 17, 2.0, 17, False),
        ([3.1] * 17, 2.0, 8, False),
        ([3.1] * 11, 2.0, 16, False),
        ([3.1] * 17, 2.0, 1004, False),
        ([2.0] * 41, 2.0, 40, True),
        ([1.3] * 41, 1.3, 40, True),
        ([0.5] * 41, 0.5, 40, False),
        ([2.0 - 0.03 * step for step in range(41)], 1.0, 40, False),
    ],
    ids=["high", "not high", "not its turn", "too early", "too few", "too late", "no better", "at rest", "learned",
         "falling"],
)  # fmt: skip
def test_stuck(losses: list[float], best: float, since: int, is_stuck: bool) -> None:
    """High above the untrained loss soon, or later no better than it, or at rest not far below it."""
    assert (stuck(view(losses, best=best, since=since), THRESHOLDS) is not None) == is_stuck


def test_the_fault() -> None:
    """It is a suspicion of the learner that a trial has to confirm, and the loss may come back by itself."""
    seen = view([3.1] * 17, since=16, highest=7.0)
    message = "after 16 updates and a climb to 7 the loss is 3.1, no better than the untrained model's 2"
    fault = Fault("stuck_loss", "learner", "loss", 3.1, message, certain=False, recovers=True, proof="trial")
    assert stuck(seen, THRESHOLDS) == fault


def test_thresholds() -> None:
    """When the loss is looked at is a threshold."""
    own = DivergingLossThresholds(stuck=StuckThresholds(min_updates=5, every=1))
    assert stuck(view([3.1] * 17, since=7), own) is not None
