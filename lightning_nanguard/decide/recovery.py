"""Decides when a cut of the rate is given back, and which rates are proven. Pure functions of the policy's state."""

from __future__ import annotations

import math
from dataclasses import replace

from lightning_nanguard.decide.state import PolicyState
from lightning_nanguard.thresholds.decision import RecoveryThresholds
from lightning_nanguard.types import Scale


def give_back(
    state: PolicyState,
    *,
    multiplier: float,
    healthy_steps: int,
    scheduled_lr: float | None,
    factor: float,
    after: int,
    learning: bool,
    limits: RecoveryThresholds,
) -> tuple[Scale | None, PolicyState]:
    """Give back a part of the learning rate's cut after many healthy updates in a row.

    If the run is learning, the rate rises to a proven rate in one step, after a short wait. Otherwise one ``factor`` is
    given back after every ``after`` healthy updates. Before the rate crosses the lowest rate that failed, the wait is
    several times as long. It doubles each time that rate fails again. Without a step nothing is due.

    Args:
        state: The state of the policy.
        multiplier: The present multiplier of the learning rate.
        healthy_steps: Updates accepted since the start of fit.
        scheduled_lr: Scheduled rate of the first group, ``None`` if it is not known.
        factor: The factor (below 1) of one cut; the multiplier is divided by it.
        after: Healthy updates before the next part is given back.
        learning: Whether the loss is falling, or has fallen and stayed there.
        limits: The thresholds.
    """
    if multiplier >= 1.0 or scheduled_lr is None:
        return None, state
    failed_from = limits.same_rate * state.bad_rate
    proven = min(1.0, state.proven_rate / scheduled_lr) if learning and scheduled_lr > 0 else 0.0
    if proven > multiplier:
        larger, wait = proven, max(1, after // limits.proven_sooner)
    else:
        larger = min(1.0, multiplier / factor)
        wait = after
        if scheduled_lr * larger >= failed_from:
            wait = after * 2 ** (state.failed_returns + limits.wait_doubled)
    if healthy_steps - state.given_back_at < wait:
        return None, state
    across = scheduled_lr * larger >= failed_from
    # A proven rate is set as a limit, because a multiplier would have to change in each step of a schedule.
    return Scale(larger / multiplier, limit=proven > multiplier), replace(
        state, given_back_at=healthy_steps, bad_rate=math.inf if across else state.bad_rate
    )


def note_too_high(rate: float, healthy_steps: int, state: PolicyState) -> PolicyState:
    """Note a rate that trials found too high without a divergence: it has failed, and no rate is proven now."""
    bad_rate = min(state.bad_rate, rate)
    return replace(state, bad_rate=bad_rate, proven_rate=0.0, proven_level=math.inf, given_back_at=healthy_steps)


def note_failed(rate: float, healthy_steps: int, state: PolicyState, limits: RecoveryThresholds) -> PolicyState:
    """Note a rate at which the learner diverged: it has failed, and a proven rate close to it no longer counts."""
    bad = min(state.bad_rate, rate)
    state = replace(state, bad_rate=bad, given_back_at=healthy_steps)
    if state.proven_rate > bad * limits.proven_below:
        state = replace(state, proven_rate=0.0, proven_level=math.inf)
    return state


def prove(
    rate: float | None, level: float | None, loss_unit: float, state: PolicyState, limits: RecoveryThresholds
) -> PolicyState:
    """Note a rate as proven, when a snapshot was certified while the run was learning.

    A rate is proven only if the loss has fallen since the last proof, because a converged run tolerates rates at which
    it could not have converged.

    Args:
        rate: Effective learning rate.
        level: Level of the loss.
        loss_unit: The unit of the loss.
        state: The state of the policy.
        limits: The thresholds.
    """
    if rate is None or level is None or level > state.proven_level - limits.progress * loss_unit:
        return state
    proven = max(rate, state.proven_rate) if rate < limits.same_rate * state.bad_rate else state.proven_rate
    return replace(state, proven_rate=proven, proven_level=level)
