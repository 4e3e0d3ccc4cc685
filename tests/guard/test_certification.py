"""When a state counts as good."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_nanguard import Detector, Fault, Reading
from lightning_nanguard.guard.certification import vouch_for_start
from lightning_nanguard.guard.context import Settings
from lightning_nanguard.thresholds import Thresholds
from lightning_nanguard.thresholds.snapshots import RingThresholds, SnapshotsThresholds
from tests.guard.plain_loop import PlainLoop, nan_at, remedies


class Doubtful(Detector):
    """Finds nothing, but has doubts about every reading."""

    def check(self, reading: Reading) -> Fault | None:
        return None

    def uneasy(self, reading: Reading) -> bool:
        return True


def certified(loop: PlainLoop) -> list[int]:
    """Steps of the certified snapshots, newest first."""
    return [snapshot.step for snapshot in loop.guard.context.ring.certified]


def test_the_start_is_good_once_its_first_loss_is() -> None:
    """One healthy update certifies what the fit began with; a bad one does not."""
    loop = PlainLoop()
    loop.run(1, nan_at(0))
    assert certified(loop) == []
    loop.run(1)
    assert certified(loop) == [0]


def test_a_snapshot_waits_for_two_healthy_updates() -> None:
    """One is taken as soon as none is pending and the interval is over; bad updates do not count."""
    loop = PlainLoop()
    loop.run(4)
    pending = loop.guard.context.ring.pending
    assert pending is not None
    assert pending.step == 4
    loop.run(3, nan_at(5, 6))
    assert certified(loop) == [0]
    loop.run(1)
    assert certified(loop) == [4, 0]
    assert pending.level is not None
    assert pending.rate == 0.1


def test_nothing_is_certified_on_uneasy_readings_for_long() -> None:
    """A detector's doubts put the certification off, by as many healthy updates as the threshold says."""
    snapshots = SnapshotsThresholds(ring=RingThresholds(certify_anyway=10))
    loop = PlainLoop(detectors=[Doubtful()], thresholds=replace(Thresholds(), snapshots=snapshots))
    loop.run(8)
    assert certified(loop) == []
    loop.run(1)
    assert certified(loop) == [0]


class Spare(nn.Linear):
    """A layer with a parameter that takes no part."""

    def __init__(self) -> None:
        super().__init__(3, 1)
        self.spare = nn.Parameter(torch.zeros(2))


def test_a_pending_snapshot_that_is_corrupt_is_a_fault() -> None:
    """NaN in a parameter that no loss tells of is found in the next snapshot, which goes; an older one is restored."""
    loop = PlainLoop(net=Spare)
    loop.run(9)
    loop.net.spare.data[1] = math.nan
    loop.run(10)
    assert remedies(loop) == [("restore",)]
    assert loop.records[0].place == "parameter spare"
    assert loop.net.spare.tolist() == [0.0, 0.0]
    assert all(torch.isfinite(one.leaves["parameter", "spare"]).all() for one in loop.guard.context.ring.certified)


def test_an_observed_snapshot_that_is_corrupt_is_named_once() -> None:
    """It is no longer pending then; what is bad still is found again in the next one, an interval later."""
    loop = PlainLoop(net=Spare, settings=Settings(snapshot_every=4, observe=True))
    loop.run(9)
    loop.net.spare.data[1] = math.nan
    loop.run(10)
    assert [record.global_step for record in loop.records] == [14, 18]
    assert {record.remedies for record in loop.records} == {("restore",)}


def test_parameters_made_by_the_first_batch_are_in_the_first_snapshot() -> None:
    """The start's snapshot is taken again once a lazy layer knows its size, before the first update."""
    loop = PlainLoop(net=lambda: nn.LazyLinear(1), settings=Settings(snapshot_every=100))
    weights = []
    loop.optimizer.register_step_pre_hook(lambda *_: weights.append(loop.net.weight.detach().clone()))
    loop.run(3)
    (start,) = loop.guard.context.ring.certified
    assert torch.equal(start.leaves["parameter", "weight"], weights[0])


@pytest.mark.parametrize(("lr", "proven"), [(0.1, 0.1), (1e-9, 0.0)])
def test_the_rate_of_a_run_that_learns_is_proven(lr: float, proven: float) -> None:
    """A snapshot that is certified after the loss has fallen proves its rate; one of a run that learns nothing does
    not."""
    loop = PlainLoop(lr=lr)
    loop.run(30)
    assert loop.guard.context.state.policy.proven_rate == proven


def test_the_first_snapshot_is_of_the_state_that_the_first_batch_finds() -> None:
    """Hooks before the first batch may load weights or switch a mode of the optimizer: a rollback to the start brings
    these back. What is not finite then is not taken as a start."""
    loop = PlainLoop()
    loop.guard.start()
    with torch.no_grad():
        loop.net.weight.fill_(0.25)
    loop.optimizer.param_groups[0]["train_mode"] = True
    loop.guard.open_batch()
    first = loop.guard.context.ring.pending
    assert first is not None
    assert first.leaves["parameter", "weight"].tolist() == [[0.25] * 3]
    assert first.leaves["group", 0, 0, "train_mode"] is True

    loop = PlainLoop()
    loop.guard.start()
    with torch.no_grad():
        loop.net.weight.fill_(math.nan)
    loop.guard.open_batch()
    first = loop.guard.context.ring.pending
    assert first is not None
    assert bool(torch.isfinite(first.leaves["parameter", "weight"]).all())


@pytest.mark.parametrize(("changed", "good"), [(False, True), (True, False)])
def test_a_start_that_is_spoilt_from_outside(changed: bool, good: bool) -> None:
    """If only numbers that are no longer finite differ, the first snapshot is good; after other changes it is not."""
    loop = PlainLoop()
    loop.run(0)
    with torch.no_grad():
        loop.net.weight[0, 0] = math.nan
        loop.net.weight[0, 1] += float(changed)
    vouch_for_start(loop.guard.context, 1)
    assert certified(loop) == []  # an update may have been made
    vouch_for_start(loop.guard.context, 0)
    assert certified(loop) == ([0] if good else [])
