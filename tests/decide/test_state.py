"""The policy's state in a checkpoint."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_nanguard.decide.state import PolicyState, within_window


@given(st.integers(0, 5), st.lists(st.integers(0, 99), max_size=4), st.floats(0, 1))
def test_the_state_survives_a_checkpoint(attempt: int, skips: list[int], rate: float) -> None:
    """What was written and read again is the same, and plain."""
    state = PolicyState(attempt, 3, ((5, "exploding_loss at loss"),), tuple(skips), rate, rate / 2, 1, 7)
    assert PolicyState.from_dict({**state.to_dict(), "an entry of another version": 1}) == state


def test_what_lies_before_the_window_is_forgotten() -> None:
    """Restores and skips up to the oldest step are dropped; without any the state is the same object."""
    state = PolicyState(restores=((5, "a"), (9, "b")), skips=(4, 9))
    assert within_window(state, 5) == PolicyState(restores=((9, "b"),), skips=(9,))
    assert within_window(state, 3) is state
