"""The level below which a loss has no shape of divergence."""

from __future__ import annotations

import pytest

from lightning_nanguard.detect.loss_shapes import LOSS_SHAPES
from lightning_nanguard.detect.loss_shapes.harmless import harmless_below
from lightning_nanguard.thresholds.detection import DivergingLossThresholds
from tests.detect.loss_shapes.views import view

THRESHOLDS = DivergingLossThresholds()


@pytest.mark.parametrize(
    ("best", "since", "low"),
    [(2.0, 10, 1.4), (0.2, 10, 1.1), (2.0, 40, 0.6), (2.0, 1000, 0.6), (2.0, 1001, 1.4)],
    ids=["well below", "nearer to the best", "may be at rest", "still", "no longer"],
)
def test_harmless_below(best: float, since: int, low: float) -> None:
    """Well below the untrained level and nearer to the best one; where a loss at rest may be stuck, lower still."""
    assert harmless_below(2.0, best, since, 40, THRESHOLDS) == pytest.approx(low)


@pytest.mark.parametrize("level", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("since", [20, 40, 1001])
def test_a_steady_loss_below_it_has_no_shape(level: float, since: int) -> None:
    """What the detector does not look at below this level would not be a fault."""
    low = harmless_below(2.0, level, since, 40, THRESHOLDS)
    if level < low:
        seen = view([level] * 60, best=level, since=since)
        assert [kind for kind, shape in LOSS_SHAPES.items() if shape(seen, THRESHOLDS)] == []
