"""The search for a rate at which the loss falls."""

from __future__ import annotations

import math

import pytest

from lightning_nanguard.act.rate_search import clipping_suffices, rehearsed_cut
from lightning_nanguard.thresholds.rate_search import CutThresholds

CUT = CutThresholds()


def test_no_rate_is_tried_below_those_that_may_be_taken() -> None:
    """A sixteenth of the best rate is the least that is taken, so nothing below it is tried."""
    tried: list[float] = []

    def rehearse(factor: float, updates: int) -> float:
        tried.append(factor)
        return 2.3 if updates == 0 else math.inf if factor > 0.2 else 0.3

    assert rehearsed_cut(rehearse, 0.5, CUT) == 0.125 / 16
    assert tried[1:] == [0.5, 0.125, 0.125 / 4, 0.125 / 16]


@pytest.mark.parametrize(
    ("ends", "cut"),
    [
        ({0.125: 0.6, 0.125 / 4: 2.6, 0.125 / 16: 0.3, 0.125 / 64: 0.4}, 0.125 / 64),
        ({0.125: 0.6, 0.125 / 4: 2.6, 0.125 / 16: 0.3}, 0.125 / 32),
        ({0.125: 0.6, 0.125 / 4: 2.6}, 0.125 / 2),
        ({0.125: 0.6, 0.125 / 4: 2.6, 0.125 / 16: 1.0, 0.125 / 64: 1.0}, 0.125 / 2),
        ({0.125: 0.6, 0.125 / 4: 2.6, 0.125 / 16: 0.99}, 0.125 / 2),
        ({0.125: 0.6, 0.125 / 4: 1.05}, 0.125 / 2),
    ],
    ids=["a lower one helps", "it alone", "none does", "none moves it", "hardly any", "no harm, only slow"],
)
def test_a_rate_that_is_good_by_accident_is_not_taken(ends: dict[float, float], cut: float) -> None:
    """Where a rate makes things worse, a larger one that made them better did so by killing units, say: the search goes
    on below both, and only where nothing helps there is it better than none."""
    ends = {0.5: math.inf, **ends}
    assert rehearsed_cut(lambda factor, updates: ends.get(factor, 1.02) if updates else 1.0, 0.5, CUT) == cut


@pytest.mark.parametrize("after", [None, 2.4, math.inf, 2.3])
def test_a_rehearsal_that_says_nothing_changes_nothing(after: float | None) -> None:
    """Where no rate helps, or none can be tried, the proposed cut stays."""
    assert rehearsed_cut(lambda factor, updates: after if updates else 2.3, 0.5, CUT) is None
    assert rehearsed_cut(lambda factor, updates: None, 0.5, CUT) is None


@pytest.mark.parametrize(
    ("uncut", "lower", "suffices"), [(0.30, 0.30, True), (0.33, 0.30, True), (0.35, 0.30, False), (2.4, 2.5, False)]
)
def test_clipping_suffices_where_the_uncut_rate_learns_as_fast(uncut: float, lower: float, suffices: bool) -> None:
    """But for a fiftieth of what a cut gains; where the loss does not fall it never does."""
    ends = {1.0: uncut, 0.5: lower, 0.125: 1.0}
    assert clipping_suffices(lambda factor, updates: ends[factor] if updates else 2.3, 0.5, CUT) is suffices


def test_how_many_rates_are_tried_is_a_threshold() -> None:
    """With fewer tries the search ends before it comes to the rate that helps."""
    ends = {0.5 * 0.25**power: math.inf for power in range(3)}
    for tries, cut in ((3, None), (4, 0.5 * 0.25**3 / 2)):
        limits = CutThresholds(tries=tries)
        assert rehearsed_cut(lambda factor, updates: ends.get(factor, 0.3) if updates else 2.3, 0.5, limits) == cut
