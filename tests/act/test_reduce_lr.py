"""The learning rate is cut, where rates can be tried to where the loss falls."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from lightning_nanguard import Fault, ReduceLR
from lightning_nanguard.thresholds.rate_search import CutThresholds
from lightning_nanguard.types import Evidence, Scale
from tests.act.run_control import RunControl

LOSS = Fault("exploding_loss", "learner", "loss", 1e6, certain=False, clipping_helps=True)
EVIDENCE = Evidence(step=100, usual_norm=2.0, lr=0.1)


def test_the_cut_goes_where_a_rehearsal_shows_the_loss_falls() -> None:
    """Rates that ruin are passed over, and so are those that fall much slower than the best."""

    def loss(factor: float, updates: int) -> float:
        rate = 1000.0 * factor
        if updates == 0:
            return 2.3
        return math.inf if rate > 2 else 2.3 - min(2.0, rate)

    run = RunControl(loss=loss)
    ReduceLR().apply(Scale(0.5), run)
    ((_, factor, _),) = run.done
    assert isinstance(factor, float)
    assert 0.4 <= 1000 * factor <= 1


@pytest.mark.parametrize(
    ("tried", "step", "cut"),
    [
        (False, Scale(0.5, most=1.0), 0.5),
        (False, Scale(0.5, most=0.01), 0.01),
        (False, Scale(0.5, most=1e-9), 1 / 1024),
        (True, Scale(0.5, most=0.01), 0.03125),
        (True, Scale(0.5, most=0.01, firm=True), 0.01),
        (True, Scale(0.5, most=1e-9, firm=True), 0.03125 / 16),
    ],
)
def test_a_cut_and_what_the_curvature_allows(tried: bool, step: Scale, cut: float) -> None:
    """The curvature along one gradient bounds a cut that could not be rehearsed, that of the steepest direction any."""
    run = RunControl(loss=lambda factor, updates: 2.3 - 2.0 * (updates > 0) if tried else None)
    ReduceLR().apply(step, run)
    ((_, factor, _),) = run.done
    assert factor == pytest.approx(cut, rel=0.01)


@pytest.mark.parametrize(("rate_factor", "cut"), [(1e-15, 1e-15), (3.0, 1 / 1024)])
def test_if_no_rate_is_good_the_run_goes_back_to_that_of_the_restored_state(rate_factor: float, cut: float) -> None:
    """A rate that has jumped is farther off than any rate that is tried; a schedule that fell is no reason for more."""
    run = RunControl(loss=lambda factor, updates: math.inf if updates else 2.3, rate_factor=rate_factor)
    ReduceLR().apply(Scale(0.5, most=1e-4), run)
    assert [done[1] for done in run.done] == [cut]


@pytest.mark.parametrize(("gain", "cut"), [(0.55, 0.03125), (0.45, 0.0625)])
def test_how_much_of_the_best_gain_may_be_missing(gain: float, cut: float) -> None:
    """A lower rate is taken if it gains at least half of what the best one gains."""
    ends = {0.5: math.inf, 0.125: 0.3, 0.03125: 2.3 - gain * 2.0}
    run = RunControl(loss=lambda factor, updates: ends.get(factor, 2.3) if updates else 2.3)
    ReduceLR().apply(Scale(0.5), run)
    assert [done[1] for done in run.done] == [cut]


@pytest.mark.parametrize(
    ("clipped", "whole", "half", "eighth", "cut"),
    [
        (True, 0.3, 0.5, 0.6, None),
        (True, 0.23, 0.5, 0.2, None),
        (True, 0.3, 0.5, 0.2, 0.125),
        (True, 0.5, 0.3, 0.2, 0.125),
        (True, math.inf, math.inf, 0.2, 0.125),
        (True, 2.5, math.inf, 0.2, 0.125),
        (True, None, None, None, 0.5),
        (False, 0.3, 0.5, 0.2, 0.125),
    ],
)
def test_clipping_may_do_without_a_cut(
    clipped: bool, whole: float | None, half: float | None, eighth: float | None, cut: float | None
) -> None:
    """Where the rate as it is learns under the new clipping, and about as fast as at half or less, it stays; else it is
    cut."""
    ends = {1.0: whole, 0.5: half}
    run = RunControl(loss=lambda factor, updates: ends.get(factor, eighth) if updates else 2.3)
    ReduceLR().apply(Scale(0.5, clipped=clipped), run)
    assert [done[1] for done in run.done] == ([] if cut is None else [pytest.approx(cut, rel=1.0)])


def test_without_rehearsals_the_cut_follows_the_growth_of_the_weights() -> None:
    """Under manual optimization weights that grew 200 times say how far the rate is off."""
    blind = replace(EVIDENCE, comparable=False, growth=200.0)
    assert ReduceLR().propose(LOSS, blind, 0) == Scale(1 / 400)
    assert ReduceLR().propose(LOSS, replace(blind, growth=5.0), 0) == Scale(0.5)


def test_rehearsing_can_be_turned_off() -> None:
    """With rehearse=False no update is tried."""
    run = RunControl(loss=lambda factor, updates: 0.1)
    ReduceLR(rehearse=False).apply(Scale(0.5), run)
    assert run.done == [("scale", 0.5, 0.0)]


def test_how_deep_a_cut_is_planned_is_a_threshold() -> None:
    """Each further attempt squares the cut, down to the largest allowed at once."""
    for thresholds, factors in (
        (None, [0.5, 0.25, 0.1, 0.1]),
        (CutThresholds(largest_at_once=0.01), [0.5, 0.25, 0.0625, 0.01]),
        (CutThresholds(most_escalated=1), [0.5, 0.25, 0.25, 0.25]),
    ):
        remedy = ReduceLR(thresholds=thresholds)
        assert [remedy.propose(LOSS, EVIDENCE, attempt) for attempt in range(4)] == [Scale(one) for one in factors]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": 1.0}, r"ReduceLR\(factor=1.0\): expected a number between 0 and 1"),
        ({"min_lr": -1.0}, r"ReduceLR\(min_lr=-1.0\)"),
        ({"recover_after": 0}, r"ReduceLR\(recover_after=0\)"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    """An argument out of range is named with its value when the object is made."""
    with pytest.raises(ValueError, match=message):
        ReduceLR(**arguments)
