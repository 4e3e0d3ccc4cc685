"""The policy, explored: every short story of faults and healthy stretches, and many long ones.

``RUNS=100000`` in the environment tells as many long stories.
"""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from lightning_nanguard import Budget, ClipGradients, Fault, ReduceLR, Remedy, Rollback, StopTraining
from lightning_nanguard.act.defaults import default_remedies
from lightning_nanguard.decide.policy import Policy
from lightning_nanguard.decide.recovery import give_back
from lightning_nanguard.decide.state import PolicyState
from lightning_nanguard.thresholds.decision import RecoveryThresholds
from lightning_nanguard.types import (
    Comparison,
    Evidence,
    Plan,
    Restore,
    RestoreAverages,
    RestoreScale,
    Scale,
    Skip,
    Stop,
    Trial,
)

LOSS = Fault("non_finite_loss", "batch", "loss", math.nan, "the loss is nan", clipping_helps=True)
SPIKE = Fault("gradient_spike", "batch", "gradient", 1e9, certain=False, clipping_helps=True)
STUCK = Fault("stuck_loss", "learner", "loss", 2.3, certain=False)
BUFFER = Fault("corrupted_state", "state", "buffer bn.running_var")
SCALE = Fault("corrupted_state", "state", "scale of the GradScaler")
FAULTS: dict[str, tuple[Fault, dict[str, Any]]] = {
    "bad input": (LOSS, {"batch_finite": False}),
    "bad batch": (LOSS, {"comparison": Comparison(math.nan, math.nan)}),
    "bad batch, late": (LOSS, {"batch_finite": False, "undo": True}),
    "ruined learner": (LOSS, {"comparison": Comparison(math.nan, 0.5), "climbing": True, "growth": 30.0}),
    "lost weights": (LOSS, {"corrupt": "parameter w", "climbing": True}),
    "lost buffer": (BUFFER, {"corrupt": "buffer bn.running_var"}),
    "lost average": (BUFFER, {"corrupt": "w of an average", "alone": "averages"}),
    "lost scale": (SCALE, {"alone": "scale"}),
    "bad batch beside a lost average": (LOSS, {"corrupt": "w", "alone": "averages", "batch_finite": False}),
    "spike": (SPIKE, {"comparison": Comparison(1.0, 1.0)}),
    "behind": (STUCK, {"trial": Trial(1.1, "start", 1 / 16)}),
    "beside": (STUCK, {"trial": Trial()}),
}
EVENTS = (*FAULTS, "8 healthy updates", "a certified snapshot")
REMEDIES: list[tuple[Remedy, ...]] = [
    default_remedies(),
    (),
    (Rollback(),),
    (Rollback(), ReduceLR(factor=0.25)),
    (ClipGradients(1.0), StopTraining()),
]


@dataclass(frozen=True)
class World:
    """A run as the policy sees it; plans change it."""

    policy: PolicyState = field(default_factory=PolicyState)
    step: int = 0
    healthy: int = 0
    since_restore: int | None = None
    bad_in_a_row: int = 0
    snapshots: int = 0
    multiplier: float = 1.0
    ended: bool = False
    plain: tuple[str, ...] = ()
    """Faults that a rollback alone answered since a snapshot was certified."""


def healthy(world: World, updates: int, *, certified: bool) -> World:
    """The world after healthy updates; a part of a cut may be given back."""
    now = world.healthy + updates
    world = replace(
        world,
        step=world.step + updates,
        healthy=now,
        bad_in_a_row=0,
        since_restore=None if world.since_restore is None else world.since_restore + updates,
    )
    if certified:
        policy = replace(world.policy, unproven=())
        world = replace(world, snapshots=min(3, world.snapshots + 1), plain=(), policy=policy)
    step, policy = give_back(
        world.policy, multiplier=world.multiplier, healthy_steps=now, scheduled_lr=0.1, factor=0.5, after=50,
        learning=True, limits=RecoveryThresholds(),
    )  # fmt: skip
    multiplier = world.multiplier * (1.0 if step is None else step.factor)
    assert multiplier <= 1 + 1e-9, "a rate is given back beyond the schedule's"
    return replace(world, policy=policy, multiplier=min(1.0, multiplier))


def faulty(world: World, decides: Policy, event: str) -> tuple[World, Plan]:
    """The world after a fault and what was decided, which is checked."""
    fault, known = FAULTS[event]
    bad = world.bad_in_a_row + 1
    evidence = Evidence(
        step=world.step + 1, healthy_steps=world.healthy, healthy_since_restore=world.since_restore, bad_in_a_row=bad,
        first=2.3, loss_unit=1.0, levels=(0.5,) * world.snapshots, usual_norm=1.0,
        lr=0.1 * world.multiplier, highest_lr=0.1 * world.multiplier, lowest_lr=0.1 * world.multiplier,
        multiplier=world.multiplier, **known,
    )  # fmt: skip
    plan, policy = decides.decide(fault, evidence, world.policy)
    check(plan, evidence, world, event, may_restore=any(one.role == "restore" for one in decides.remedies))
    restored = any(isinstance(one, Restore) for one in plan)
    alone = bool(plan) and all(isinstance(one, (Restore, RestoreScale)) for one in plan) and not evidence.undo
    factor = math.prod(one.factor for one in plan if isinstance(one, Scale))
    return replace(
        world,
        policy=policy,
        step=world.step + 1,
        bad_in_a_row=bad,
        since_restore=0 if restored else world.since_restore,
        multiplier=world.multiplier * factor,
        ended=any(isinstance(one, Stop) for one in plan),
        plain=(*world.plain, event) if alone else world.plain,
    ), plan


def check(plan: Plan, evidence: Evidence, world: World, event: str, *, may_restore: bool) -> None:
    """What holds of every plan."""
    for one in plan:
        if isinstance(one, Restore):
            assert 0 <= one.depth < max(1, len(evidence.levels)), "only a certified snapshot is gone back to"
            assert evidence.levels or evidence.undo
        if isinstance(one, Scale):
            assert 0 < one.factor <= 1, "a fault never raises the rate"
    if evidence.corrupt is not None and not any(isinstance(one, Stop) for one in plan):
        back = any(isinstance(one, Restore) for one in plan)
        part = evidence.alone == "averages" and any(isinstance(one, RestoreAverages) for one in plan)
        spared = evidence.alone == "averages" and not may_restore
        assert back or part or spared, "lost weights are never trained on, or skipped for"
    if event == "lost average":
        assert not any(isinstance(one, (Restore, Scale, Skip, Stop)) for one in plan), "averages cost the run nothing"
    if event == "beside":
        assert plan == (), "a trial that shows nothing changes nothing"
    if plan and all(isinstance(one, (Restore, RestoreScale)) for one in plan) and not evidence.undo:
        assert Counter(world.plain)[event] < 2, "a rollback that changed nothing twice is not made again"


def tell(world: World, decides: Policy, event: str) -> World:
    """The world after an event."""
    if event in FAULTS:
        if FAULTS[event][0] is STUCK and world.healthy < 40:
            return world  # a trial needs updates to compare with
        return faulty(world, decides, event)[0]
    return healthy(world, 8, certified=event == "a certified snapshot")


def explore(world: World, decides: Policy, depth: int) -> int:
    """Tell every story of a length; gives their number."""
    if not depth or world.ended:
        return 1
    return sum(explore(tell(world, decides, event), decides, depth - 1) for event in EVENTS)


@pytest.mark.parametrize("remedies", REMEDIES, ids=lambda some: "+".join(type(one).__name__ for one in some) or "none")
def test_every_short_story(remedies: tuple[Remedy, ...]) -> None:
    """Whatever the first events are, from a start without a snapshot and from one with three, every plan is sound."""
    decides = Policy(remedies)
    assert explore(World(), decides, 4) > 500
    assert explore(World(healthy=400, step=400, snapshots=3), decides, 4) > 500


def test_long_stories() -> None:
    """The same holds over a hundred events in a row, with small budgets and with the usual ones."""
    draw = random.Random(0)
    for run in range(int(os.environ.get("RUNS", "400"))):
        budget = draw.choice([Budget(), Budget(max_rollbacks=3, window=200), Budget(max_bad_batches=4)])
        decides, world = Policy(REMEDIES[run % len(REMEDIES)], budget), World()
        weights = [draw.random() for _ in EVENTS]
        for event in draw.choices(EVENTS, weights, k=100):
            world = tell(world, decides, event)
            if world.ended:
                break
        assert len(world.policy.restores) <= budget.max_rollbacks + 1


@pytest.mark.parametrize("other", FAULTS)
@pytest.mark.parametrize("event", FAULTS)
def test_faults_without_a_healthy_update_end(event: str, other: str) -> None:
    """Two faults by turns, with no healthy update between them, end the run within the budget's window, unless nothing
    is done at all but to averages; lost weights end it within thirty. Faults that are only suspected end no run: the
    guard stops acting on them."""
    budget = Budget(window=300)
    suspected = {event, other} <= {"lost average", "spike", "behind", "beside"}
    for remedies in REMEDIES:
        decides, world, acted = Policy(remedies, budget), World(healthy=400, step=400, snapshots=3), 0
        for turn in range(2 * budget.window):
            world, plan = faulty(world, decides, (event, other)[turn % 2])
            acted += any(not isinstance(step, RestoreAverages) for step in plan)
            if world.ended:
                break
        stops = any(isinstance(one, StopTraining) for one in remedies)
        if suspected:
            assert acted <= budget.window
            assert stops or not world.ended
        else:
            assert world.ended or not acted
        if {event, other} <= {"lost weights", "ruined learner"} and remedies:
            assert world.step < 430
