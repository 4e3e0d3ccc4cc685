"""Which rates count as new for another trial. Whole runs are in test_trial.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_nanguard.guard.rates_tried import RatesTried
from tests.guard.branching import BranchingLoop


@pytest.mark.parametrize(
    ("multiplier", "noted", "new"),
    [(1.0, [], False), (0.5, [], True), (1.0, [(90, 0.1)], False), (1.0, [(90, 0.4)], True), (1.0, [(40, 0.4)], False)],
    ids=["the same", "cut", "a little higher", "far higher", "far higher before the trial"],
)
def test_a_rate_that_a_trial_has_not_tested_is_new(
    multiplier: float, noted: list[tuple[int, float]], new: bool
) -> None:
    """A rate is new if the guard has cut it, or if it is far above all rates before. A resumed run knows of it."""
    context = BranchingLoop(lr=0.1).guard.context
    rates, resumed = RatesTried(context), RatesTried(context)
    assert rates.is_new()  # no trial has tested any
    context.state.step = 80
    context.state.rates.append((1, 0.1))
    rates.note()
    resumed.load_state_dict(rates.state_dict())
    context.state.rates.extend(noted)
    context.rate.set_multiplier(multiplier)
    assert rates.is_new() is resumed.is_new() is new
    rates.forget()
    assert rates.is_new()


def test_the_rate_of_an_arm_is_not_new() -> None:
    """If the run goes on from an arm, the trial has tested the rate that the run then has."""
    context = BranchingLoop(lr=0.1).guard.context
    rates = RatesTried(context)
    rates.note_arm(0.25)
    assert rates.is_new()  # there was no trial
    rates.note()
    rates.note_arm(0.25)
    context.rate.set_multiplier(0.25)
    assert not rates.is_new()


@pytest.mark.parametrize(("rolled_back", "highest"), [(False, 0.4), (True, 0.1)])
def test_the_rates_before_a_rollback_are_not_survived(rolled_back: bool, highest: float) -> None:
    """A rollback gives up what the rates before it had made of the run."""
    context = BranchingLoop(lr=0.1).guard.context
    state, rates = context.state, RatesTried(context)
    state.rates.extend([(1, 0.1), (20, 0.4), (21, 0.1)])
    state.step = 80
    if rolled_back:
        state.policy = replace(state.policy, restores=((60, "loss"),))
        state.healthy_since_restore = 20
    rates.note()
    assert rates.state_dict() == {"newest": (80, 1.0, highest)}


def test_a_rate_that_has_fallen() -> None:
    """As after a peak of a schedule: it was far higher since an update than it is now."""
    context = BranchingLoop(lr=0.1).guard.context
    context.state.rates.extend([(1, 0.1), (20, 0.4), (30, 0.1)])
    rates = RatesTried(context)
    assert [rates.has_fallen(since) for since in (10, 25, 40)] == [True, True, False]
