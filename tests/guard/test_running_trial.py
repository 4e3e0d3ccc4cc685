"""Which arm the losses of a trial choose, and when it is compared. Trials of whole runs are in test_trial.py."""

from __future__ import annotations

from typing import Any, cast

import pytest

from lightning_nanguard.guard.branch import Branch
from lightning_nanguard.guard.running_trial import Arm, RunningTrial
from lightning_nanguard.thresholds.trial import TrialThresholds
from tests.guard.branching import SUSPICION

LIMITS = TrialThresholds()


def trial(losses: dict[float, list[float]], **options: Any) -> RunningTrial:
    """A trial whose arms have these losses, by factor."""
    arms = [Arm(factor, cast(Branch, None), list(known)) for factor, known in losses.items()]
    return RunningTrial(SUSPICION, 40, 40, {}, {}, arms, LIMITS, **options)


def test_the_start_is_measured_on_the_last_batches_before_the_pick() -> None:
    """Arms that continue are not compared with the start, because an earlier trial has done so."""
    measured = [number for number in range(1, 20) if trial({}, updates=number).measures_start]
    assert measured == [12, 13, 14, 15, 16]
    assert not trial({}, updates=16, before=64).measures_start


@pytest.mark.parametrize(("best", "kept"), [(1 / 256, 1 / 64), (1 / 16, 1 / 64), (1 / 4, 1 / 16)])
def test_the_arms_next_to_the_best_are_picked(best: float, kept: float) -> None:
    """Beside the best arm the one at the next lower rate, or at the next higher one if none is lower."""
    running = trial({one: [1.0] * 8 + [0.5 if one == best else 0.6] * 8 for one in LIMITS.factors}, start=[0.9] * 5)
    assert running.pick() == []
    assert {arm.factor for arm in running.arms} == {best, kept}


@pytest.mark.parametrize(
    ("level", "options", "asked"),
    [
        (0.6, {}, True),
        (0.3, {}, False),
        (0.6, {"before": 64}, False),
        (float("nan"), {}, True),
    ],
    ids=["raises", "lowers", "continues", "not finite"],
)
def test_lower_rates_are_asked_for_if_even_the_best_arm_raises_the_loss(
    level: float, options: dict[str, Any], asked: bool
) -> None:
    """The rates asked for are lower than all others. With them all arms are picked again."""
    running = trial(dict.fromkeys((1 / 4, 1 / 16), [level] * 16), start=[0.4] * 5, updates=16, **options)
    lower = running.pick()
    assert lower == ([factor / 16 for factor in LIMITS.factors] if asked else [])
    running.extend([Arm(factor, cast(Branch, None)) for factor in lower])
    assert (len(running.arms), running.updates, running.start) == (2 + len(lower), 0, [])


def test_no_rate_below_the_lowest_is_asked_for() -> None:
    """The lowest factor ends the search."""
    assert trial({LIMITS.least_factor: [0.6] * 16}, start=[0.4] * 5).pick() == []


@pytest.mark.parametrize(("ahead", "kept"), [(0.1, True), (0.5, False)])
def test_an_arm_from_the_best_state_goes_on_if_it_is_ahead(ahead: float, kept: bool) -> None:
    """It goes on beside the others, and no lower rates are needed then."""
    running = trial({1 / 4: [0.4] * 16, 1.0: [ahead] * 16}, start=[0.2] * 5)
    assert bool(running.pick()) is not kept
    assert [arm.from_best for arm in running.arms] == [False, *[True] * kept]


def test_when_arms_are_compared() -> None:
    """One comparison ends at half of the updates and one with the trial, each with the arm that was best before it."""
    begun = {}
    for number in range(17, 65):
        running = trial({1 / 4: [1.0] * number, 1 / 16: [0.5] * number}, updates=number)
        running.compare_if_due(2.0)
        if running.comparison is not None:
            begun[number] = running.comparison
    assert [(number, one.batches, one.final) for number, one in begun.items()] == [(23, 10, False), (44, 21, True)]
    assert [one.arm.factor for one in begun.values()] == [1 / 16, 1 / 16]
    assert [one.limits.left_out for one in begun.values()] == [LIMITS.left_out_early, LIMITS.left_out]


@pytest.mark.parametrize(("loss", "over"), [(1.0, [*[False] * 20, True]), (0.1, [*[False] * 10, *[True] * 11])])
def test_when_a_comparison_is_over(loss: float, over: list[bool]) -> None:
    """With the last batch, or from half of the batches on if the arm does not lead."""
    running = trial({1 / 4: [0.5] * 44}, updates=44)
    running.compare_if_due(2.0)
    compared, seen = running.comparison, []
    assert compared is not None
    for _ in range(21):
        compared.add("later", loss)
        seen.append(compared.over)
    assert seen == over


def test_the_best_arm_now() -> None:
    """The one at the highest rate of those that are about as good counts as best, never one at the present rate; an arm
    is the best of all only if it is ahead of every other one."""
    running = trial({1 / 4: [1.0] * 40 + [0.50] * 20, 1 / 16: [0.5] * 60, 1.0: [0.4] * 60}, updates=60)
    assert running.best_now(2.0).factor == 1 / 4
    assert [running.is_best(arm) for arm in running.arms] == [False, False, True]
