"""A loss far above the untrained model's that is not falling."""

from __future__ import annotations

import pytest

from lightning_nanguard import Fault
from lightning_nanguard.detect.loss_shapes.exploding import exploding
from lightning_nanguard.thresholds.detection import DivergingLossThresholds, ExplodingThresholds
from tests.detect.loss_shapes.views import view

THRESHOLDS = DivergingLossThresholds()


@pytest.mark.parametrize(
    ("losses", "explodes"),
    [
        ([2.0] * 3 + [30.0] * 8, True),
        ([2.0] * 3 + [30.0] * 4, False),
        ([2.0] * 3 + [21.0] * 8, False),
        ([2.0] * 3 + [100.0] * 4 + [60.0] * 4, False),
        ([2.0] * 3 + [3000.0] * 3, True),
        ([2.0] * 3 + [3000.0] * 2, False),
        ([2.0] * 3 + [9000.0, 5000.0, 3000.0], False),
    ],
    ids=["steadily", "too few", "not far", "coming back", "abruptly", "too few at once", "coming back at once"],
)
def test_exploding(losses: list[float], explodes: bool) -> None:
    """Far above for some readings, or very far above for a few, and not about to return."""
    assert (exploding(view(losses), THRESHOLDS) is not None) == explodes


def test_the_fault() -> None:
    """It is a suspicion of the learner; clipping helps, and its excess is the distance to the untrained loss."""
    assert exploding(view([2.0] * 3 + [30.0] * 8), THRESHOLDS) == Fault(
        "exploding_loss",
        "learner",
        "loss",
        30.0,
        "the loss is 30; the untrained model's was 2",
        certain=False,
        clipping_helps=True,
        excess=28.0,
    )


def test_thresholds() -> None:
    """How many readings it takes is a threshold."""
    own = DivergingLossThresholds(exploding=ExplodingThresholds(readings=4))
    assert exploding(view([2.0] * 3 + [30.0] * 4), own) is not None
