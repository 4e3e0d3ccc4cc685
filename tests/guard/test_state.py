"""What a guard counts and remembers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_nanguard.guard.state import GuardState


def test_a_rate_is_noted_where_it_changes() -> None:
    """With the step of the change; a group without a rate has none."""
    state = GuardState()
    for rate in (None, 0.1, 0.1, 0.05, 0.05, 0.1, None, 0.1):
        state.note_rate(rate)
        state.step += 1
    assert list(state.rates) == [(1, 0.1), (3, 0.05), (5, 0.1)]


def test_the_first_rate_and_the_last_rollback() -> None:
    """Both are known from the start on, if there are any."""
    state = GuardState()
    assert (state.first_rate, state.last_rollback) == (None, 0)
    state.rates.extend([(1, 0.1), (5, 3.0)])
    state.policy = replace(state.policy, restores=((10, "loss"), (19, "loss")))
    assert (state.first_rate, state.last_rollback) == (0.1, 19)


def test_a_schedule_that_changes_in_every_step_takes_bounded_memory() -> None:
    """The oldest rates go."""
    state = GuardState()
    for state.step in range(3000):
        state.note_rate(1.0 / (state.step + 1))
    assert len(state.rates) == 1024
    assert state.rates[-1] == (2999, 1.0 / 3000)


@pytest.mark.parametrize(
    ("rates", "highest"),
    [
        ([(1, 0.1), (50, 3.0), (70, 0.1)], 3.0),
        ([(1, 3.0), (30, 0.1)], 0.1),
        ([(1, 3.0), (60, 0.1)], 3.0),
        ([], 0.0),
    ],
    ids=["a peak", "before that update", "since that update", "unknown"],
)
def test_the_highest_rate_since_an_update(rates: list[tuple[int, float]], highest: float) -> None:
    """The rate that was in force at that update counts, too."""
    state = GuardState()
    state.rates.extend(rates)
    assert state.highest_rate(40) == highest


def test_the_evaluations_of_one_step_are_one_update() -> None:
    """LBFGS evaluates its closure several times in a step; other optimizers may make several updates in a batch."""
    state = GuardState()
    assert [state.count(0, several=False) for _ in range(3)] == [True] * 3
    assert [state.count(1, several=True) for _ in range(3)] == [True, False, False]
    assert (state.step, state.next_step) == (4, 4)
    assert state.count(0, several=False)
    assert (state.step, state.next_step) == (5, 6)


def test_the_evaluations_of_one_step_are_one_bad_update() -> None:
    """A loss that is bad in four evaluations of one step is not usual yet."""
    state = GuardState()
    assert not any(state.note_bad_loss(7, 4) for _ in range(4))
    assert [state.note_bad_loss(step, 4) for step in (8, 9, 10)] == [False, False, True]


def test_what_belongs_to_a_batch_ends_with_it() -> None:
    """An exception, a cause, a batch left out and a step under way are of one batch; the counts go on."""
    state = GuardState(step=7, bad_in_a_row=2, evaluating=1, raised="it raised", passed_over=True)
    state.redo_cause = "optimizer_update", "net.0.weight"
    state.end_batch()
    assert state == GuardState(step=7, bad_in_a_row=2)
