"""What a trial shows: the share of what can be learned that a run lacks."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_nanguard.decide.trial import TrialLosses, is_enough, judge_trial, lead, pick_arm
from lightning_nanguard.thresholds.trial import TrialThresholds
from lightning_nanguard.types import Trial

LIMITS = TrialThresholds()


def losses(start: float, best: float, now: float, later: float, arm: float, *, noise: float = 0.0) -> TrialLosses:
    """Sixteen batches under each state: each batch has a difficulty of its own, and each loss some noise."""
    draw = random.Random(0)
    hard = [draw.gauss(0, 0.5) for _ in range(16)]
    made = [[level + one + noise * draw.gauss(0, 1) for one in hard] for level in (start, best, now, later, arm)]
    return TrialLosses(*made, factor=1 / 16)


@pytest.mark.parametrize(
    ("levels", "lacks", "base"),
    [
        ((2.0, 2.0, 2.1, 2.2, 1.0), 1.1, "start"),
        ((2.0, 2.0, 1e6, math.inf, 1.0), 1e6, "start"),
        ((2.0, 1.9, 1.8, 1.5, 1.0), 0.5, "start"),
        ((2.0, 1.05, 1.8, 1.5, 1.0), 0.5, "best"),
        ((2.0, 1.05, 1.5, 1.09, 1.0), 0.0, "start"),
        ((2.0, 1.5, 1.5, 0.9, 1.0), 0.0, "start"),
        ((2.0, 2.0, 2.1, 2.2, 2.0), 0.0, "start"),
        ((2.0, 2.0, 2.1, 2.2, math.nan), 0.0, "start"),
    ],
    ids=["ruined", "exploded", "behind", "behind what it was", "hardly behind", "ahead", "nothing learns", "arm lost"],
)
def test_the_share_decides(levels: tuple[float, float, float, float, float], lacks: float, base: str) -> None:
    """A run that lacks a clear share of what the arm learned goes back to the state worth going back to."""
    trial = judge_trial(losses(*levels), LIMITS)
    assert trial.lacks == pytest.approx(lacks, rel=0.01)
    assert trial.base == base
    assert (trial.lacks > 0) == (lacks > 0)


def test_many_equal_losses_show_nothing() -> None:
    """Losses of few different values may be lower under the arm on most batches although their median is not."""
    arm, start = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 3.0, 4.0, 5.0, 1.0]
    assert judge_trial(TrialLosses(start, start, start, start, arm, factor=1 / 16), LIMITS).lacks == 0.0


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 5), min_size=5, max_size=21))
def test_coarse_losses_never_confirm_without_progress(rows: list[tuple[int, ...]]) -> None:
    """Whatever few values the losses take, a confirmed trial has a positive share, and an arm better than the start."""
    one = TrialLosses(*([float(value) for value in column] for column in zip(*rows, strict=True)), factor=1 / 16)
    trial = judge_trial(one, replace(LIMITS, left_out=0.0))
    assert trial.lacks >= 0.0
    assert trial.lacks == 0.0 or sum(one.arm) < sum(one.start)


def test_an_arm_from_the_best_state_goes_on() -> None:
    """The run continues from an arm of the best state, also if that state was about as good as the arm is now."""
    one = replace(losses(2.0, 1.05, 1.8, 1.5, 1.0), factor=1.0)
    trial = judge_trial(one, LIMITS)
    assert (trial.base, trial.factor, trial.continues) == ("best", 1.0, True)
    assert judge_trial(replace(one, factor=0.5), LIMITS).continues is False
    assert is_enough(trial, 1, LIMITS)
    assert [is_enough(replace(trial, factor=0.25), shown, LIMITS) for shown in (1, 2)] == [False, True]


def test_of_arms_that_are_about_as_good_the_highest_rate_goes_on() -> None:
    """The rate of the best arm counts only if it is clearly ahead of those at higher rates."""
    assert pick_arm([1 / 16, 1 / 64], [1.1, 1.0], 3.0, LIMITS) == 0
    assert pick_arm([1 / 16, 1 / 64], [1.3, 1.0], 3.0, LIMITS) == 1
    assert pick_arm([1 / 16, 1 / 64], [1.1, 1.0], None, LIMITS) == 1
    assert pick_arm([1 / 16, 1 / 64], [math.inf, math.inf], 3.0, LIMITS) == 0


def test_worse_than_it_was() -> None:
    """A run that lost a third of what it had learned goes back to its best state, if an arm does better."""
    limits = replace(LIMITS, lacks=0.9)
    assert judge_trial(losses(2.0, 1.2, 1.8, 1.7, 1.0), limits).base == "best"
    assert judge_trial(losses(2.0, 1.6, 1.8, 1.7, 1.0), limits) == Trial()


@given(st.integers(-60, 60), st.tuples(*[st.floats(0.1, 10.0)] * 5), st.floats(0.0, 0.5))
@settings(max_examples=200)
def test_the_unit_of_the_loss_does_not_matter(
    exponent: int, levels: tuple[float, float, float, float, float], noise: float
) -> None:
    """Losses times a power of two give the same trial, bit for bit."""
    one = losses(*levels, noise=noise)
    states = (one.start, one.best, one.now, one.later, one.arm)
    scaled = [[math.ldexp(loss, exponent) for loss in state] for state in states]
    assert judge_trial(TrialLosses(*scaled, factor=one.factor), LIMITS) == judge_trial(one, LIMITS)


@pytest.mark.parametrize(("batches", "left_out"), [(21, LIMITS.left_out), (10, LIMITS.left_out_early)])
def test_noise_alone_hardly_ever_confirms(batches: int, left_out: float) -> None:
    """States that are equally good differ by chance. Fewer than 1 in 100 trials of them confirm a suspicion."""
    draw, limits = random.Random(0), replace(LIMITS, left_out=left_out)
    trials = [[[1.0 + draw.gauss(0, 1) for _ in range(batches)] for _ in range(5)] for _ in range(2000)]
    confirmed = [judge_trial(TrialLosses(*states, factor=0.25), limits).lacks > 0 for states in trials]
    assert sum(confirmed) < 20


def test_outliers_decide_nothing() -> None:
    """A run that is worse on a few batches, however much, does not lack anything. A loss that is 0 on half of the
    batches hides nothing."""
    good, outliers = [1.0] * 20, [1e6] * 4 + [1.0] * 16
    assert judge_trial(TrialLosses([2.0] * 20, good, outliers, outliers, good, factor=0.25), LIMITS) == Trial()
    separable, arm = [0.0, 5.0] * 10, [0.01, 0.1] * 10
    trial = judge_trial(TrialLosses([0.7] * 20, [0.7] * 20, separable, separable, arm, factor=0.25), LIMITS)
    assert trial.lacks > LIMITS.plain


def test_what_the_run_knows_already_counts_too() -> None:
    """On batches from before the trial the arm has to be better as well: what comes may be new to the run alone."""
    ruined = losses(2.0, 2.0, 2.1, 2.2, 1.0)
    assert judge_trial(replace(ruined, kept_run=[2.0] * 4, kept_arm=[1.0] * 4), LIMITS).lacks > 0
    assert judge_trial(replace(ruined, kept_run=[0.5] * 4, kept_arm=[1.0] * 4), LIMITS) == Trial()


def test_losses_that_are_not_finite_are_the_highest() -> None:
    """A state with one such loss leads nothing, and leads states that have more of them than are left out."""
    good, lost, both = [1.0] * 5, [1.0] * 4 + [math.nan], [math.inf] * 5
    assert lead(lost, good, LIMITS) == lead(both, both, LIMITS) == lead([], [], LIMITS) == -math.inf
    assert lead(good, both, LIMITS) == math.inf
    assert lead(good, lost, LIMITS) == 0.0
    assert lead([1.0], [2.0], LIMITS) == 1.0  # one batch is never left out
