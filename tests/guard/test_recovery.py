"""Lower rates and clipping: reviewed, and given back."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lightning_nanguard import ClipGradients, ReduceLR, Remedy, Rollback
from lightning_nanguard.thresholds import Thresholds
from tests.guard.branching import SUSPICION, BranchingLoop
from tests.guard.plain_loop import PlainLoop, remedies


def thresholds(first_after: int) -> Thresholds:
    """Reviews come so many healthy updates after a cut, and a loss counts as one that no longer falls."""
    defaults = Thresholds()
    review = replace(defaults.rate_search.review, first_after=first_after)
    history = replace(defaults.detection.history, recent=4, falling=1e9)
    return replace(
        defaults,
        rate_search=replace(defaults.rate_search, review=review),
        detection=replace(defaults.detection, history=history),
    )


class Forgetful(PlainLoop):
    """Whatever is learned again from its batch is at the expense of others."""

    trained = 0.0

    def train_on(self, index: int) -> float | None:
        self.trained += 10.0
        return super().train_on(index)

    def loss_on(self, index: int) -> float | None:
        forgotten, self.trained = self.trained, 0.0
        loss = super().loss_on(index)
        return None if loss is None else loss + forgotten


def cut(loop: PlainLoop, factor: float = 0.25) -> None:
    """Lower the rate, as after a fault of the learner."""
    loop.guard._parts.recovery.scale(factor, 0.0)


@pytest.mark.parametrize(
    ("listed", "cuts"),
    [(None, 3), ([ReduceLR(min_lr=0.01)], 1), ([ReduceLR(rehearse=False)], 0), ([Rollback()], 0)],
    ids=["as it comes", "down to min_lr", "without rehearsals", "without ReduceLR"],
)
def test_reviews_lower_a_rate_so_often(listed: list[Remedy] | None, cuts: int) -> None:
    """Whatever reviews say, a rate goes down three times in a row at most, not below ``min_lr``, and not at all where
    the user did not list that remedy; a resumed run counts on."""
    loop = Forgetful(remedies=listed, thresholds=thresholds(10))
    loop.run(2)
    cut(loop)
    loop.run(60)
    assert [record.fault for record in loop.records] == ["rate_still_high"] * cuts
    assert loop.guard.context.rate.effective()[0] == pytest.approx(max(0.1 * 0.25 ** (1 + cuts), 0.01 * (cuts == 1)))
    again = Forgetful(remedies=listed, thresholds=thresholds(10))
    again.guard._parts.recovery.load_state_dict(loop.guard._parts.recovery.state_dict())
    assert again.guard._parts.recovery.state_dict() == loop.guard._parts.recovery.state_dict()
    assert loop.guard._parts.recovery.state_dict()["lowered"] == cuts


def test_no_review_lowers_a_rate_that_a_trial_found() -> None:
    """A trial compares rates on more batches than a review."""
    loop = Forgetful(thresholds=thresholds(10))
    loop.run(2)
    loop.guard._parts.recovery.scale(0.25, 0.0, tried=True)
    loop.run(60)
    assert loop.records == []
    assert loop.guard.context.rate.effective() == [pytest.approx(0.025)]
    again = Forgetful(thresholds=thresholds(10))
    again.guard._parts.recovery.load_state_dict(loop.guard._parts.recovery.state_dict())
    assert again.guard._parts.recovery.state_dict() == loop.guard._parts.recovery.state_dict()
    cut(loop, 0.5)
    loop.run(30)
    assert loop.records[0].fault == "rate_still_high"


def test_a_review_raises_a_rate_that_was_cut_too_far() -> None:
    """It is doubled while four times as much would bring far more, and never beyond the schedule's."""
    loop = PlainLoop(thresholds=thresholds(5))
    loop.run(2)
    cut(loop, 1e-3)
    loop.run(60)
    assert set(remedies(loop)) == {("give back",)}
    rates = [loop.records[0].lr_before, *(record.lr_after for record in loop.records)]
    assert rates == pytest.approx([1e-4 * 2**times for times in range(len(rates))])
    assert rates[-1] <= 0.1


@pytest.mark.parametrize(("after", "given"), [(10, 3), (1000, 0)])
def test_a_cut_is_given_back_after_a_healthy_stretch(after: int, given: int) -> None:
    """By one factor at a time, each after as many healthy updates as the user says."""
    loop = PlainLoop(remedies=[ReduceLR(factor=0.5, recover_after=after)], thresholds=thresholds(10**6))
    loop.run(2, lambda step, batch: batch.fill_(0.0))
    cut(loop, 0.125)
    loop.run(40, lambda step, batch: batch.fill_(0.0))
    assert remedies(loop) == [("give back",)] * given
    assert loop.guard.context.rate.multiplier == 0.125 * 2**given


def test_no_review_raises_a_rate_while_a_trial_tests_whether_it_is_still_too_high() -> None:
    """The rate is that of the trial before. It is raised as soon as the present one has found nothing against it.

    A rate that was cut without a trial is raised meanwhile, which ends the trial.
    """
    for tried, outcome in ((True, "not confirmed"), (False, "no result")):
        loop = BranchingLoop(lr=0.1, thresholds=thresholds(5))
        loop.run(30)
        certified, trials = loop.guard.context.ring.certified, loop.guard._parts.beside.trials
        loop.guard._parts.recovery.scale(1e-3, 0.0, tried=tried)
        loop.run(1)
        assert trials.begin(SUSPICION, certified[-1], certified[0])
        loop.run(20)
        assert trials.running is tried
        assert (remedies(loop) == []) is tried
        loop.run(100)
        assert loop.guard.context.trials.given[0].outcome == outcome
        assert ("give back",) in remedies(loop)


def test_a_rate_that_a_trial_shows_to_be_harmful_is_not_given_back() -> None:
    """It is tried first, where rates may be tried."""
    for rehearse, given in ((True, []), (False, [("give back",)])):
        reduce = ReduceLR(factor=0.5, recover_after=30, rehearse=rehearse)
        loop = Forgetful(remedies=[reduce], thresholds=thresholds(10**6))
        loop.run(2)
        cut(loop)
        loop.run(30)
        assert remedies(loop)[:1] == given


def test_clipping_ends_after_a_healthy_stretch() -> None:
    """As long as the user says, from the moment it began; the rate is left alone."""
    loop = PlainLoop(remedies=[ClipGradients(5.0, recover_after=10)])
    loop.run(5)
    loop.guard._parts.recovery.clip(5.0, "norm")
    loop.run(9)
    assert loop.guard.context.clipper.value == 5.0
    loop.run(1)
    assert loop.guard.context.clipper.value is None
    assert remedies(loop) == [("end clipping",)]


def test_a_run_that_was_never_cut_is_left_alone() -> None:
    """No review, no rate given back, whatever a trial would say."""
    loop = Forgetful(thresholds=thresholds(1))
    loop.run(40)
    assert loop.records == []
    assert loop.trained == 0.0
    assert math.isclose(loop.guard.context.rate.multiplier, 1.0)


def test_a_limit_bounds_a_rate_that_rises() -> None:
    """The schedule goes on below it, and a further cut lowers the limit."""
    loop = PlainLoop()
    recovery, rate = loop.guard._parts.recovery, loop.guard.context.rate
    recovery.scale(0.5, 0.0, limit=True)
    loop.optimizer.param_groups[0]["lr"] = 0.4
    assert rate.effective() == [0.05]
    recovery.scale(0.5, 0.0)
    assert rate.effective() == [0.025]
    loop.optimizer.param_groups[0]["lr"] = 0.01
    assert rate.effective() == [0.01]
