"""What a remedy does to a run."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_nanguard import Fault, Reading
from lightning_nanguard.guard.context import Settings
from lightning_nanguard.guard.found import FoundFault
from lightning_nanguard.guard.remedy_actions import RemedyActions
from tests.guard.plain_loop import PlainLoop, nan_at, state
from tests.helpers import copied, differences


def actions_of(loop: PlainLoop, known_until: int = 0) -> RemedyActions:
    """The actions of a guard in the middle of an intervention."""
    parts = loop.guard._parts
    found = FoundFault(Fault("mine", "learner", "loss"), Reading(loop.guard.updates, 0, 1.0, 1.0))
    return parts.judge.runner.actions(found, known_until)


def trained(batches: int = 20) -> PlainLoop:
    loop = PlainLoop()
    loop.run(batches)
    return loop


@pytest.mark.parametrize("depth", [0, 1, 99])
def test_a_restore_is_bitwise_and_repeatable(depth: int) -> None:
    """The learner is that of the snapshot, so deep or the oldest; newer ones and the gradients are gone."""
    loop = trained()
    ring = loop.guard.context.ring
    target = ring.certified[min(depth, len(ring.certified) - 1)]
    kept = copied(target.leaves)
    for _ in range(2):
        actions = actions_of(loop)
        actions.restore(depth if _ == 0 else 0)
        assert ring.certified[0] is target
        assert actions.restored is target
        assert differences(dict(loop.guard.context.learner.leaves()), kept) == []
        assert all(parameter.grad is None for parameter in loop.net.parameters())
        loop.run(1)


def test_before_anything_was_certified_the_start_is_restored() -> None:
    """The pending snapshot of the start, which stays pending; without one nothing happens."""
    loop = PlainLoop()
    loop.run(1, nan_at(0))
    pending = loop.guard.context.ring.pending
    actions = actions_of(loop)
    with torch.no_grad():
        loop.net.weight.fill_(7.0)
    actions.restore(0)
    assert actions.restored is pending
    assert loop.guard.context.ring.pending is pending
    assert not bool((loop.net.weight == 7.0).any())
    loop.guard.context.ring.clear()
    actions = actions_of(loop)
    actions.restore(0)
    assert actions.restored is None


@pytest.mark.parametrize(("known_until", "left"), [(0, 16), (18, 18)])
def test_what_was_read_of_later_states_is_forgotten(known_until: int, left: int) -> None:
    """But for first readings that stay known; the next snapshot is due an interval later, and the updates since the
    restore are counted anew."""
    loop = trained(22)
    actions = actions_of(loop, known_until)
    actions.restore(1)
    history = loop.guard.context.monitors.history(0)
    assert actions.restored is not None
    assert actions.restored.step == 16
    assert len(history.losses()) == left
    assert not loop.guard._parts.snapshots.due(25)
    assert loop.guard._parts.snapshots.due(26)
    assert loop.guard.context.state.healthy_since_restore == 0


@pytest.mark.usefixtures("late")
def test_readings_on_their_way_are_forgotten() -> None:
    """They are of weights that are no more."""
    loop = PlainLoop(settings=Settings(snapshot_every=4, deferred=True))
    loop.run(20)
    loop.train(torch.full((8, 3), math.nan))
    actions_of(loop).restore(0)
    loop.guard.flush()
    assert loop.records == []


def test_moments_are_dropped() -> None:
    """The optimizer begins anew; the weights stay."""
    loop = trained()
    before = copied(loop.net.state_dict())
    actions_of(loop).drop_moments()
    assert len(loop.optimizer.state) == 0
    assert differences(copied(loop.net.state_dict()), before) == []


def test_rates_are_tried_from_the_state_restored_only() -> None:
    """Without a restore there is no place to begin; a trial is in loss units, and leaves the restored state."""
    loop = trained()
    actions = actions_of(loop)
    assert actions.rehearse(0.5, 8) is None
    actions.restore(0)
    before = copied(state(loop))
    unit = loop.guard.context.monitors.loss_unit()
    assert actions.rehearse(1.0, 0) == pytest.approx(loop.probe() / unit)
    learned = actions.rehearse(1.0, 8)
    assert learned is not None
    assert learned < actions.rehearse(1.0, 0)
    assert differences(copied(state(loop)), before) == []


def test_rate_and_clipping_change_the_run() -> None:
    """A cut multiplies, a limit bounds, clipping is on from now on."""
    loop = trained()
    actions = actions_of(loop)
    actions.scale(0.5, 0.0)
    assert loop.guard.context.rate.effective() == [0.05]
    actions.scale(0.5, 0.0, limit=True)
    assert loop.guard.context.rate.effective() == [0.025]
    loop.optimizer.param_groups[0]["lr"] = 10.0
    assert loop.guard.context.rate.effective() == [0.025]
    actions.clip(3.0, "norm")
    assert loop.guard.context.clipper.value == 3.0
