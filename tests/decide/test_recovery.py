"""When a cut is given back, and which rates are proven."""

from __future__ import annotations

import dataclasses

from lightning_nanguard.decide.recovery import give_back, note_too_high, prove
from lightning_nanguard.decide.state import PolicyState
from lightning_nanguard.thresholds.decision import RecoveryThresholds

LIMITS = RecoveryThresholds()


def test_a_proven_rate_is_given_back_quickly_and_a_failed_one_slowly() -> None:
    """The way back is short up to a rate that held, and long across one that failed."""
    state = PolicyState(bad_rate=1.0, proven_rate=0.1)

    def waits(scheduled: float, multiplier: float) -> int:
        for healthy in range(1, 100_000):
            step, _ = give_back(
                state, multiplier=multiplier, healthy_steps=healthy, scheduled_lr=scheduled, factor=0.5, after=1000,
                learning=True, limits=LIMITS,
            )  # fmt: skip
            if step is not None:
                return healthy
        return -1

    assert (waits(0.1, 0.5), waits(1.0, 0.25), waits(1.0, 0.5)) == (50, 1000, 4000)


def test_a_rate_found_too_high_does_not_come_back_as_proven() -> None:
    """Nothing counts as proven then, the same rate is not proven by a snapshot from before, and a lower one may be."""
    state = note_too_high(0.1, 70, PolicyState(proven_rate=0.1, proven_level=0.5))
    assert (state.bad_rate, state.proven_rate, state.given_back_at) == (0.1, 0.0, 70)
    assert prove(0.1, 0.5, 0.5, state, LIMITS).proven_rate == 0.0
    assert prove(0.099, 0.5, 0.5, state, LIMITS).proven_rate == 0.0  # an update earlier in a warmup
    assert prove(0.025, 0.5, 0.5, state, LIMITS).proven_rate == 0.025
    assert note_too_high(0.4, 70, state).bad_rate == 0.1


def test_a_rate_is_proven_only_while_the_loss_falls() -> None:
    """Under a schedule that goes on rising, rates at which the run stays where it is are not proven by its staying."""
    state, proven = PolicyState(), []
    for rate, level in ((0.01, 2.0), (0.02, 1.5), (0.04, 1.45), (0.08, 1.5), (0.16, 1.41)):
        state = prove(rate, level, 0.5, state, LIMITS)
        proven.append(state.proven_rate)
    assert proven == [0.01, 0.02, 0.02, 0.02, 0.02]
    assert prove(0.01, 1.0, 0.5, state, LIMITS).proven_rate == 0.02  # a lower one takes nothing back
    state = dataclasses.replace(state, bad_rate=0.1)
    assert prove(0.32, 1.0, 0.5, state, LIMITS).proven_rate == 0.02
