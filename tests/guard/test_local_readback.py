"""Readings before the step, and up to two updates late."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_nanguard.guard.context import Settings
from lightning_nanguard.guard.local_readback import DeferredReadings, LocalReadback
from lightning_nanguard.guard.meter import Meter
from lightning_nanguard.guard.readback import Arrived
from lightning_nanguard.guard.state import GuardState
from lightning_nanguard.measure.readings import PendingReading
from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.state.learner import Learner
from tests.guard.plain_loop import PlainLoop, remedies


def pending(step: int, loss: float = 1.0, norm: float = 1.0) -> PendingReading:
    return PendingReading(step, 0, torch.tensor(loss), [torch.tensor(norm)])


def readings_of(loop: PlainLoop, *, by_loss: bool = True, observe: bool = False) -> DeferredReadings:
    return DeferredReadings(loop.guard.context.learner, loop.guard.context.state, by_loss=by_loss, observe=observe)


@pytest.mark.usefixtures("late")
def test_only_readings_two_updates_old_are_waited_for() -> None:
    """The others stay on their way, the oldest in front."""
    loop = PlainLoop()
    readings = readings_of(loop)
    for step in (1, 2, 3, 4):
        readings.defer(pending(step), BatchUndo(loop.net), line_search=False)
    assert readings.arrived(2) is None
    taken = [one for _ in range(3) if (one := readings.arrived(4)) is not None]
    assert [reading.step for reading, *_ in taken] == [1, 2]
    assert len(readings) == 2
    assert readings.next()[0].step == 3


def test_readings_that_have_arrived_are_read_at_once() -> None:
    """However new they are."""
    loop = PlainLoop()
    readings = readings_of(loop)
    for step in (1, 2):
        readings.defer(pending(step), BatchUndo(loop.net), line_search=False)
    taken = [one for _ in range(3) if (one := readings.arrived(2)) is not None]
    assert [reading.step for reading, *_ in taken] == [1, 2]


@pytest.mark.usefixtures("late")
def test_before_an_update_that_is_read_in_time_all_others_are_read() -> None:
    """Else it would be judged before them."""
    loop = PlainLoop(settings=Settings(deferred=True))
    readback, caution = loop.guard._parts.readback, loop.guard._parts.caution
    for step in (1, 2):
        readback.readings.defer(pending(step), BatchUndo(loop.net), line_search=False)
    loop.guard.context.state.step = 2
    assert list(readback.due(0)) == []
    caution.load_state_dict({"undone": 1, "careful_until": 10})
    assert [one.reading.step for one in readback.due(0)] == [1, 2]


FLAGS = {"found_inf", "grad_scale"}


@pytest.mark.parametrize(
    ("loss", "norm", "by_loss", "flag"),
    [
        (1.0, 1.0, True, 0.0),
        (1.0, math.inf, True, 1.0),
        (math.nan, 1.0, True, 1.0),
        (math.nan, 1.0, False, 0.0),
        (1.0, math.nan, False, 1.0),
        (1e30, 1e30, True, 0.0),
    ],
)
def test_a_fused_optimizer_is_told_on_the_device(loss: float, norm: float, by_loss: bool, flag: float) -> None:
    """By the gradient, and by the loss where there is one process; what is finite is let through. The flag is gone
    after the batch."""
    loop = PlainLoop(fused=True)
    readings = readings_of(loop, by_loss=by_loss)
    sent = pending(1, loss, norm)
    readings.defer(sent, BatchUndo(loop.net), line_search=False)
    assert float(loop.optimizer.found_inf) == flag
    assert sent.held_back
    readings.drop_flags()
    assert FLAGS.isdisjoint(vars(loop.optimizer))


def test_no_flag_outlasts_its_batch() -> None:
    """A fused optimizer is the user's again after each batch."""
    loop = PlainLoop(fused=True, settings=Settings(deferred=True))
    told = []
    loop.optimizer.register_step_pre_hook(lambda *_: told.append(vars(loop.optimizer).keys() >= FLAGS))
    loop.run(3)
    assert any(told)
    assert FLAGS.isdisjoint(vars(loop.optimizer))


@pytest.mark.parametrize(("fused", "observe"), [(False, False), (True, True)], ids=["not fused", "observing"])
def test_other_optimizers_are_told_nothing(fused: bool, observe: bool) -> None:
    """One that is not fused would not listen, and an observed one must not."""
    loop = PlainLoop(fused=fused)
    sent = pending(1, math.nan)
    readings_of(loop, observe=observe).defer(sent, BatchUndo(loop.net), line_search=False)
    assert FLAGS.isdisjoint(vars(loop.optimizer))
    assert not sent.held_back


def test_buffers_of_a_bad_batch_are_put_back_before_the_next() -> None:
    """Where the device holds the update back, later batches build on the buffers of before; those of a good batch
    stay."""
    for norm, kept in ((math.nan, 0.0), (1.0, 5.0)):
        loop = PlainLoop(fused=True, net=lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)))
        undo = BatchUndo(loop.net)
        undo.open()
        loop.net[0].running_mean.fill_(5.0)
        readings_of(loop).defer(pending(1, 1.0, norm), undo, line_search=False)
        assert loop.net[0].running_mean.tolist() == [kept] * 3


@pytest.mark.parametrize(
    ("fused", "norm", "reached"), [(True, math.nan, False), (True, 1e6, True), (False, math.nan, True)]
)
def test_whether_a_bad_update_reached_the_weights(fused: bool, norm: float, reached: bool) -> None:
    """The device holds back what is not finite; a finite spike is made, and any update of another optimizer."""
    loop = PlainLoop(fused=fused, settings=Settings(deferred=True))
    loop.guard._parts.readback.readings.defer(pending(1, 1.0, norm), BatchUndo(loop.net), line_search=False)
    (arrived,) = loop.guard._parts.readback.flush()
    assert isinstance(arrived, Arrived)
    assert arrived.reached is reached


@pytest.mark.usefixtures("late")
def test_a_late_fault_is_on_record_under_its_own_batch() -> None:
    """Step and batch are those of the bad batch, though it was found two updates later."""
    loop = PlainLoop(fused=True, settings=Settings(snapshot_every=4, deferred=True))
    loop.run(30, lambda step, batch: batch[0].fill_(math.nan) if step == 12 else None)
    assert remedies(loop) == [("skip",)]
    assert (loop.records[0].global_step, loop.records[0].batch_idx) == (13, 12)


def test_the_reading_is_that_of_the_update_at_hand() -> None:
    """Loss and norm, before the step is made; the losses it was made of are used up."""
    loop = PlainLoop(settings=Settings())
    meter, undo = loop.guard._parts.meter, BatchUndo(loop.net)
    readback = loop.guard._parts.readback
    loss = loop.loss()
    meter.see_loss(loss)
    loss.backward()
    loop.guard.context.state.step = 7
    arrived = readback.submit(0, undo)
    norm = torch.cat([parameter.grad.flatten() for parameter in loop.net.parameters()]).norm()
    assert arrived is not None
    assert arrived.undo is undo
    assert (arrived.reading.step, arrived.reading.loss) == (7, loss.item())
    torch.testing.assert_close(torch.tensor(arrived.reading.grad_norm), norm)
    assert (arrived.late, arrived.reached, arrived.line_search) == (False, False, False)
    again = meter.measure_now(8, 0)
    assert again is not None
    assert again.loss is None


def test_an_update_without_loss_and_gradient_has_no_reading() -> None:
    """Such as the step of an optimizer whose parameters took no part."""
    loop = PlainLoop(settings=Settings())
    assert loop.guard._parts.readback.submit(0, BatchUndo(loop.net)) is None
    assert loop.guard._parts.readback.at_hand is None


def test_further_closures_of_one_step_are_a_line_search() -> None:
    """LBFGS evaluates the loss several times in a step: what comes after the first only tries a place out."""
    loop = PlainLoop()
    optimizer = torch.optim.LBFGS(loop.net.parameters(), max_iter=4)
    learner, state = Learner(loop.net, [optimizer]), GuardState()
    meter = Meter(learner, loop.micro_batches)
    readings = DeferredReadings(learner, state, by_loss=True, observe=False)
    readback = LocalReadback(meter, state, readings, loop.guard._parts.caution)
    seen = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loop.loss()
        meter.see_loss(loss)
        loss.backward()
        arrived = readback.submit(0, BatchUndo(loop.net))
        assert arrived is not None
        seen.append(arrived.line_search)
        return loss

    loop.batch = torch.randn(8, 3)
    for _ in range(2):
        optimizer.step(closure)
        meter.end_batch()
    first = seen.index(False, 1)
    assert seen[:2] == [False, True]
    assert seen.count(False) == 2
    assert seen[first + 1 :] == [True] * len(seen[first + 1 :])


def test_nothing_is_ever_late() -> None:
    """No reading is on its way, and none arrives after the end of its batch."""
    readback = PlainLoop(settings=Settings()).guard._parts.readback
    assert not readback.end_batch()
    assert list(readback.due(0)) == list(readback.arrived()) == list(readback.flush()) == []
