"""When readings are read before their update although they are deferred."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_nanguard import Fault, Reading
from lightning_nanguard.guard.caution import Caution
from lightning_nanguard.guard.context import Settings
from lightning_nanguard.guard.found import FoundFault
from lightning_nanguard.thresholds import Thresholds
from tests.guard.plain_loop import PlainLoop, is_finite, nan_at, remedies

DEFERRED = Settings(snapshot_every=4, deferred=True)


def thresholds(careful: int) -> Thresholds:
    """So many updates are read in time after the first one was undone."""
    defaults = Thresholds()
    return replace(defaults, decision=replace(defaults.decision, careful=careful))


def found(step: int, *, reached: bool = True) -> FoundFault:
    return FoundFault(Fault("non_finite_loss", "batch", "loss"), Reading(step, 0, math.nan, 1.0), reached=reached)


def caution_of(settings: Settings = DEFERRED, **options: object) -> tuple[PlainLoop, Caution]:
    loop = PlainLoop(settings=settings, thresholds=thresholds(20), **options)
    return loop, loop.guard._parts.caution


def test_an_undone_update_is_followed_by_some_that_are_read_in_time(caplog: pytest.LogCaptureFixture) -> None:
    """A bad batch among those is skipped; after them readings are late again, and the next time twice as many are read
    in time."""
    loop = PlainLoop(settings=DEFERRED, thresholds=thresholds(20))
    loop.run(130, nan_at(10, 25, 50, 85, 110))
    assert remedies(loop) == [("restore",), ("skip",), ("restore",), ("skip",), ("restore",)]
    assert [f"reads the next {count} updates before" in caplog.text for count in (20, 40, 80)] == [True] * 3
    assert is_finite(loop)


def test_the_number_is_doubled() -> None:
    """20, 40, 80 and so on."""
    loop, caution = caution_of()
    waits = []
    for _ in range(13):
        step = loop.guard.context.state.step = loop.guard.context.state.step + 1
        caution.update_undone(found(step), buffers=False)
        waits.append(caution.state_dict()["careful_until"] - step)
        loop.guard.context.state.step += waits[-1]
        assert caution.may_be_late(0)
    assert waits == [20 * 2**times for times in range(13)]


def test_only_an_update_that_reached_the_weights_counts() -> None:
    """What was held back costs nothing, nor does an update from before the last one undone."""
    loop, caution = caution_of()
    loop.guard.context.state.step = 50
    caution.update_undone(found(50, reached=False), buffers=False)
    assert caution.may_be_late(0)
    caution.update_undone(found(50), buffers=False)
    caution.update_undone(found(49), buffers=False)
    assert not caution.may_be_late(0)
    assert caution.state_dict() == {"undone": 1, "careful_until": 70, "never_late": False}


def test_after_spoiled_statistics_every_update_is_read_in_time(caplog: pytest.LogCaptureFixture) -> None:
    """For the rest of the run, and it is said once."""
    loop, caution = caution_of()
    for _ in range(2):
        caution.update_undone(found(5, reached=False), buffers=True)
    loop.guard.context.state.step = 10**9
    assert not caution.may_be_late(0)
    assert caplog.text.count("a batch made a buffer bad") == 1


def test_what_was_learned_is_in_the_checkpoint() -> None:
    """A resumed run is as careful as the one it goes on from; one from before there was such an entry is not."""
    loop, caution = caution_of()
    loop.guard.context.state.step = 50
    caution.update_undone(found(50), buffers=False)
    other, resumed = caution_of()
    other.guard.load_state_dict(loop.guard.state_dict())
    assert resumed.state_dict() == caution.state_dict()
    assert not resumed.may_be_late(0)
    resumed.load_state_dict({})
    assert resumed.may_be_late(0)


@pytest.mark.parametrize(("observe", "late"), [(False, False), (True, True)])
def test_the_first_step_of_fused_momentum_is_read_in_time(observe: bool, late: bool) -> None:
    """The device cannot skip it; where nothing is skipped it may be late."""
    loop, caution = caution_of(Settings(deferred=True, observe=observe), fused=True)
    loop.loss().backward()
    assert caution.may_be_late(0) is late
    loop.optimizer.step()
    assert caution.may_be_late(0)


def test_without_deferred_readings_nothing_is_late(caplog: pytest.LogCaptureFixture) -> None:
    """And an update that was undone teaches nothing."""
    caplog.set_level(logging.DEBUG)
    _, caution = caution_of(Settings())
    assert not caution.may_be_late(0)
    caution.update_undone(found(5), buffers=True)
    assert caution.state_dict() == {"undone": 0, "careful_until": 0, "never_late": False}
    assert caplog.text == ""


class Normalised(nn.Sequential):
    """Behind batch norm a batch however large is one like any other in the loss."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm1d(3), nn.Linear(3, 1))


def test_a_batch_that_spoils_statistics_is_skipped_once_one_was_seen() -> None:
    """The first such batch is undone when it shows in a snapshot; from then on it is kept out before its update."""
    loop = PlainLoop(net=Normalised, settings=DEFERRED, lr=0.01)
    loop.loss = lambda: loop.net(loop.batch).square().mean()

    def spoil(step: int, batch: torch.Tensor) -> None:
        if step in (120, 160):
            batch *= 1e7

    loop.run(200, spoil)
    assert remedies(loop) == [("restore",), ("skip",)]
    assert loop.records[1].fault == "implausible_statistics"
    assert loop.records[1].global_step == 161
