"""What an acting guard changes, and what an observing one leaves alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_nanguard import Budget, Fault, Intervention, Reading, ReduceLR, TrainingDivergedError
from lightning_nanguard.guard.context import Settings
from lightning_nanguard.guard.found import FoundFault
from lightning_nanguard.types import Clip, Plan, Scale
from tests.guard.plain_loop import PlainLoop, is_finite, nan_at, remedies, state
from tests.helpers import copied, differences

OBSERVE = Settings(snapshot_every=4, observe=True)


def test_observing_changes_nothing() -> None:
    """A run that goes NaN ends bit by bit as without a guard, and the records say what would have been done."""
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        loop = PlainLoop(settings=OBSERVE)
        if not watched:
            loop.guard.before_step = lambda index: None
        loop.run(20, nan_at(15))
        ends.append(copied(state(loop)))
    assert differences(*ends) == []
    assert loop.records
    assert not any(record.applied for record in loop.records)


def test_observing_ends_no_run() -> None:
    """A stop is on record, again and again, and no error is raised."""
    loop = PlainLoop(settings=OBSERVE, budget=Budget(max_bad_batches=3))
    loop.run(30, nan_at(*range(10, 30)))
    assert loop.step == 30
    assert ("stop",) in remedies(loop)


def test_observing_goes_back_nowhere() -> None:
    """A restore that would have been made names no snapshot and loses no update; rate and clipping stay as they are."""
    loop = PlainLoop(settings=OBSERVE, lr=100.0)
    loop.run(60)
    restores = [record for record in loop.records if "restore" in record.remedies]
    assert restores
    assert all(record.snapshot_step is None and record.updates_lost == 0 for record in restores)
    assert loop.guard.context.rate.multiplier == 1.0
    assert loop.guard.context.clipper.value is None


class Noting(PlainLoop):
    """Notes how many updates had been made when each record came."""

    def __init__(self, **options: Any) -> None:
        self.made: list[int] = []
        super().__init__(**options)

    def record(self, intervention: Intervention) -> None:
        self.made.append(self.clock()[0])
        super().record(intervention)


def test_an_observed_batch_is_on_record_before_its_update() -> None:
    """The record is made while the batch has not changed the weights; an acting guard makes it once the batch is
    over. Both have the step after that update."""
    made, steps = [], []
    for settings in (OBSERVE, Settings(snapshot_every=4)):
        loop = Noting(settings=settings)
        loop.run(13, nan_at(12))
        made.append(loop.made[0])
        steps.append(loop.records[0].global_step)
    assert made == [12, 13]
    assert steps == [13, 13]


def test_a_stopped_run_holds_the_newest_good_weights() -> None:
    """The error names the step of the state that is in the module."""
    loop = PlainLoop(budget=Budget(max_bad_batches=3))
    with pytest.raises(TrainingDivergedError, match="updates in a row were bad") as error:
        loop.run(30, nan_at(*range(20, 30)))
    newest = loop.guard.context.ring.certified[0]
    assert error.value.snapshot_step == newest.global_step
    assert differences(loop.net.weight.detach(), newest.leaves["parameter", "weight"]) == []


def test_a_run_stopped_before_anything_was_good_holds_what_it_began_with() -> None:
    """Weights that are changed and lost in the first batch are those of the start again, which were at least finite."""
    loop = PlainLoop()
    began = copied(loop.net.state_dict())

    def spoil(step: int, batch: torch.Tensor) -> None:
        with torch.no_grad():
            loop.net.weight[0, 0] = math.inf
            loop.net.weight[0, 1] += 1.0

    with pytest.raises(TrainingDivergedError, match="there is no good state yet to go back to") as error:
        loop.run(1, spoil)
    assert error.value.snapshot_step is None
    assert is_finite(loop)
    assert differences(dict(loop.net.state_dict()), dict(began)) == []


class Keeps(ReduceLR):
    """Leaves the rate as it is."""

    def apply(self, step: object, run: object) -> None:
        pass


@pytest.mark.parametrize("clipped", [True, False])
def test_a_cut_that_clipping_made_needless_is_not_on_record(clipped: bool) -> None:
    """A cut planned beside clipping may not be made, and then is not among the steps done; a cut alone always is."""
    loop = PlainLoop(remedies=[Keeps()])
    loop.run(4)
    plan: Plan = (Clip(1.0), Scale(0.5, clipped=clipped))
    found = FoundFault(Fault("exploding_loss", "learner", "loss"), Reading(4, 0, 9.0, 9.0))
    done = list(loop.guard._parts.judge.runner.apply(plan, found, 0).steps)
    assert done == (list(plan[:1]) if clipped else list(plan))
    assert loop.guard.context.clipper.value == 1.0
