"""Numbers that are far from all numbers before and after them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lightning_nanguard.detect.outliers import Far, Outlier, OutlierSearch, ranges_below, times_above, times_off

CALM = [1.0, 1.2, 0.9, 1.1]


def found(far: Far, values: Sequence[float], *, least: int = 2) -> list[float]:
    search = OutlierSearch(far, before=4, least=least, after=2)
    outliers = [search.add(step, value) for step, value in enumerate(values)]
    return [one.value for one in outliers if one is not None]


@pytest.mark.parametrize(
    ("values", "outliers"),
    [
        ([*CALM, 50.0, *CALM], [50.0]),
        ([*CALM, 50.0, 60.0, *CALM], []),  # the first two of many
        ([*CALM, 50.0, 1.0], []),  # what follows is not known yet
        ([1.0, 50.0, *CALM], []),  # too few before it
        ([*CALM, 50.0, *CALM, *CALM, 70.0, *CALM], [50.0, 70.0]),
        ([0.0, 0.0, 0.0, 50.0, 0.0, 0.0], []),  # without a size of the others nothing is far
    ],
)
def test_an_outlier_stands_alone(values: Sequence[float], outliers: list[float]) -> None:
    """It is far from those before and from those after it, and is found once these have come."""
    assert found(times_above(10.0), values) == outliers


@pytest.mark.parametrize(
    ("values", "outlier"),
    [
        ([*CALM, 50.0], Outlier(4, 50.0, 0.9, 1.2)),
        ([*CALM, 50.0, 1.0], Outlier(4, 50.0, 0.9, 1.2)),
        ([*CALM, 50.0, 60.0], None),
        ([*CALM, 50.0, 1.0, 1.0], None),  # found before
        ([1.0, 50.0], None),  # too few before it
        (CALM, None),
    ],
)
def test_an_outlier_at_the_end(values: Sequence[float], outlier: Outlier | None) -> None:
    """A number that is far above the others is found at the end although too few follow it."""
    search = OutlierSearch(times_above(10.0), before=4, least=2, after=2)
    for step, value in enumerate(values):
        search.add(step, value)
    assert search.at_end(times_above(10.0)) == outlier


def test_a_single_number_is_no_outlier() -> None:
    """Without others to compare with, nothing is far."""
    search = OutlierSearch(times_above(10.0), before=3, least=0, after=3)
    search.add(0, 50.0)
    assert search.at_end(times_above(10.0)) is None


def test_what_is_said_of_an_outlier() -> None:
    """Its step and value, and between which values the others lie; after a rewind nothing is compared."""
    search = OutlierSearch(times_above(10.0), before=2, least=1, after=1)
    assert [search.add(step, value) for step, value in enumerate([1.0, 2.0, 90.0, 3.0])][-1] == Outlier(
        2, 90.0, 1.0, 3.0
    )
    assert (Outlier(2, 9.0, 1.0, 3.0).distance, Outlier(2, 0.5, 1.0, 3.0).distance) == (6.0, 0.5)
    search.clear()
    assert [search.add(step, value) for step, value in enumerate([90.0, 3.0])] == [None, None]


@pytest.mark.parametrize(
    ("rates", "outliers"),
    [
        ([0.1, 0.1, 0.1, 30.0, 0.1, 0.1], [30.0]),
        ([0.1, 0.1, 0.1, 1e-40, 0.1, 0.1], [1e-40]),
        ([1e-40, 0.1, 0.1, 0.1], [1e-40]),  # the first update
        ([0.1, 0.1, 0.1, 0.0, 0.1, 0.1], []),  # left out on purpose
        ([1e-8, 0.05, 0.1, 0.15, 0.2, 0.2], []),  # a warm-up
        ([0.02, 0.05, 0.1, 45.0, 0.2, 0.25, 0.3], [45.0]),  # within a warm-up
        ([0.1, 0.1, 0.1, 0.001, 0.001, 0.001], []),  # a step of a schedule
        ([0.1, 0.06, 0.01, 1e-5, 0.1, 0.06, 0.01, 1e-5, 0.1], []),  # a schedule that begins again
        ([0.1, 1e-4, 0.1, 1e-4, 0.1, 1e-4, 0.1], []),  # two rates in turn
    ],
)
def test_a_rate_is_an_outlier_among_steady_ones(rates: Sequence[float], outliers: list[float]) -> None:
    """Above or below them, also in the first update; schedules have no outliers."""
    assert found(times_off(10.0, steady=2.0), rates, least=0) == outliers


@pytest.mark.parametrize("unit", [1.0, 0.25, 4.0])
@pytest.mark.parametrize("shift", [0.0, 8.0, -8.0])
def test_losses_are_compared_by_differences(unit: float, shift: float) -> None:
    """Neither their unit nor a constant matters; a loss above the others is no outlier."""
    losses = [1.0, 1.25, 1.0, 0.25, 1.25, 1.0, 1.25, 1.0, 0.625, 1.0, 1.25, 1.0, 1.25, 9.0, 1.0, 1.25]
    values = [unit * loss + shift for loss in losses]
    assert found(ranges_below(2.0), values) == [unit * 0.25 + shift]
