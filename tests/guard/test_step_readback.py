"""Readings before the step."""

from __future__ import annotations

import torch

from lightning_nanguard.guard.context import Settings
from lightning_nanguard.guard.meter import Meter
from lightning_nanguard.guard.state import GuardState
from lightning_nanguard.guard.step_readback import StepReadback
from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.state.learner import Learner
from tests.guard.plain_loop import PlainLoop


def test_the_reading_is_that_of_the_update_at_hand() -> None:
    """Loss and norm, before the step is made; the losses it was made of are used up."""
    loop = PlainLoop(settings=Settings())
    meter, undo = loop.guard._parts.meter, BatchUndo(loop.net)
    readback = StepReadback(meter, loop.guard.context.state)
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
    meter = Meter(Learner(loop.net, [optimizer]), loop.micro_batches)
    readback = StepReadback(meter, GuardState())
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
    assert list(readback.due(0)) == list(readback.arrived(0)) == list(readback.flush()) == []
