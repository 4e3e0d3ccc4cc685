"""What a guard counts and remembers."""

from __future__ import annotations

from dataclasses import replace

from lightning_nanguard.guard.state import GuardState


def test_a_rate_is_noted_where_it_changes() -> None:
    """With the step of the change; a group without a rate has none."""
    state = GuardState()
    for rate in (None, 0.1, 0.1, 0.05, 0.05, 0.1, None, 0.1):
        state.note_rate(rate)
        state.step += 1
    assert list(state.rates) == [(1, 0.1), (3, 0.05), (5, 0.1)]


def test_the_highest_rate_of_the_run() -> None:
    """Since the last rollback, or since the start; a rate that was set earlier and kept counts, too."""
    state = GuardState()
    assert (state.first_rate, state.highest_rate()) == (None, None)
    state.rates.extend([(1, 0.1), (5, 3.0), (6, 0.1), (20, 0.05)])
    assert (state.first_rate, state.highest_rate()) == (0.1, 3.0)
    state.policy = replace(state.policy, restores=((10, "loss"),))
    assert state.highest_rate() == 0.1
    state.policy = replace(state.policy, restores=((10, "loss"), (19, "loss")))
    assert state.highest_rate() == 0.05


def test_a_schedule_that_changes_in_every_step_takes_bounded_memory() -> None:
    """The oldest rates go."""
    state = GuardState()
    for state.step in range(3000):
        state.note_rate(1.0 / (state.step + 1))
    assert len(state.rates) == 1024
    assert state.rates[-1] == (2999, 1.0 / 3000)


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
