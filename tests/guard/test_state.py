"""What a guard counts and remembers."""

from __future__ import annotations

from lightning_nanguard.guard.state import GuardState


def test_a_rate_is_noted_where_it_changes() -> None:
    """With the step of the change; a group without a rate has none."""
    state = GuardState()
    for rate in (None, 0.1, 0.1, 0.05, 0.05, 0.1, None, 0.1):
        state.note_rate(rate)
        state.step += 1
    assert list(state.rates) == [(1, 0.1), (3, 0.05), (5, 0.1)]


def test_a_schedule_that_changes_in_every_step_takes_bounded_memory() -> None:
    """The oldest rates go."""
    state = GuardState()
    for state.step in range(3000):
        state.note_rate(1.0 / (state.step + 1))
    assert len(state.rates) == 1024
    assert state.rates[-1] == (2999, 1.0 / 3000)
