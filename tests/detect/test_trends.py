"""What the newest losses and norms say: pure functions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_nanguard.detect.trends import (
    climbs,
    has_burst,
    loss_falls,
    loss_level,
    loss_noise,
    spread,
    usual_norm,
)
from lightning_nanguard.thresholds.detection import (
    BurstThresholds,
    ClimbThresholds,
    HistoryThresholds,
    UsualNormThresholds,
)


@pytest.mark.parametrize(
    ("losses", "noise"),
    [([], 0.0), ([5.0], 0.0), ([1.0, 4.0, 2.0], 3.0),
     ([0.0, 3.0, 9.0, 3.0, 9.0, 0.0, 3.0, 9.0], 1.4826 * 3.0 / math.sqrt(2)),
     ([100.0 + step for step in range(8)], 0.0)],
    ids=["nothing known", "one", "range of a few", "noise", "a trend is no noise"],
)  # fmt: skip
def test_loss_noise(losses: list[float], noise: float) -> None:
    """Where zero lies does not matter, and the unit only as a factor."""
    for shift, factor in ((0.0, 1.0), (-7.0, 1.0), (0.0, 8.0)):
        moved = [factor * loss + shift for loss in losses]
        assert loss_noise(moved, HistoryThresholds()) == pytest.approx(factor * noise)


def test_loss_level() -> None:
    """A mean that leaves out the highest loss, where there is more than one."""
    assert [loss_level(losses) for losses in ([], [3.0], [9.0, 1.0, 2.0])] == [None, 3.0, 1.5]


def test_loss_falls() -> None:
    """The noise is that within the halves, so a clear fall is not taken for noise."""
    assert loss_falls([2.0, 2.1, 2.0, 2.1, 1.0, 1.1, 1.0, 1.1], errors=2.0)
    assert not loss_falls([2.0, 3.1, 1.0, 2.1, 1.9, 3.0, 0.9, 2.0], errors=2.0)
    assert not loss_falls([1.0, 1.1, 1.0, 1.1, 2.0, 2.1, 2.0, 2.1], errors=2.0)
    quick = [2.0, 3.0, 2.0, 3.0, 2.0, 2.0, 1.0, 1.0]
    assert loss_falls(quick, errors=2.0)
    assert not loss_falls(quick, errors=3.0)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(-1e3, 1e3))
def test_spread_does_not_depend_on_where_the_values_lie(values: list[float], shift: float) -> None:
    """The spread of shifted values is that of the values."""
    assert spread([value + shift for value in values]) == pytest.approx(spread(values), abs=1e-6)


@pytest.mark.parametrize(
    ("norms", "first", "usual"),
    [([1.0] * 3, 0.0, None), ([4.0, 2.0, 3.0, 5.0], 0.0, 2.0), ([*map(float, range(1, 21))], 0.0, 6.0),
     ([1e-9] * 20, 3.0, 0.03)],
    ids=["too few", "the least of a few", "lower quartile", "saturated"],
)  # fmt: skip
def test_usual_norm(norms: list[float], first: float, usual: float | None) -> None:
    """A lower quartile, of a few the least, and a hundredth of the first norm at least."""
    assert usual_norm(norms, first, UsualNormThresholds()) == usual


def test_climbs() -> None:
    """All of the newest have to lie above the range of the others. The one before them may be part of the climb."""
    thresholds = ClimbThresholds(noise=4.0, min_others=1)
    assert not climbs([1.0, 1.0, 9.0, 9.0], 0.5, replace(thresholds, min_others=3))
    assert not climbs([1.0, 9.0, 9.0], 0.5, thresholds)
    for between in (1.0, 9.0):
        assert climbs([1.0, between, 9.0, 9.0], 0.5, thresholds)
        assert not climbs([1.0, between, 9.0, 9.0], 8.0, thresholds)
        assert not climbs([1.0, between, 9.0, 1.0], 0.5, thresholds)
    assert not climbs([1.0, 9.0, 9.0, 9.0], 0.5, replace(thresholds, newest=3))


def test_has_burst() -> None:
    """A norm far above those before it, and above the first of the run."""
    thresholds = BurstThresholds(times=20.0, before=2, min_before=3)
    assert has_burst([1.0, 1.0, 1.0, 21.0], 1.0, thresholds)
    assert not has_burst([1.0, 1.0, 1.0, 21.0], 30.0, thresholds)
    assert not has_burst([1.0, 1.0, 21.0, 1.0], 1.0, thresholds)
    assert has_burst([9.0, 1.0, 1.0, 21.0], 9.0, thresholds)
