"""A look at an update while it can still be made again; whole runs are in tests/trainer/repeat/test_step_runner.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_nanguard.guard.context import Settings
from lightning_nanguard.guard.step_check import StepCheck
from tests.guard.plain_loop import PlainLoop


def at_step(loss: float = 1.0, gradient: float = 0.1, **options: Any) -> tuple[PlainLoop, StepCheck]:
    """A loop between backward and the optimizer's step."""
    loop = PlainLoop(**options)
    loop.run(6)
    loop.guard.open_batch()
    for parameter in loop.net.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    loop.guard.see_loss(torch.tensor(loss))
    return loop, loop.guard.steps.check


@pytest.mark.parametrize(
    ("loss", "gradient", "kind", "place"),
    [
        (1.0, 0.1, None, None),
        (math.nan, 0.1, "non_finite_loss", "loss"),
        (1.0, math.inf, "non_finite_gradient", "gradient of weight"),
        (1.0, 1e25, "gradient_overflow", "gradient"),
        (1.0, 1e5, None, None),
    ],
)
def test_only_what_is_certain_is_a_fault(loss: float, gradient: float, kind: str | None, place: str | None) -> None:
    """A loss or gradient that is not finite or overflows, named; a spike may be sound and is none."""
    _, check = at_step(loss, gradient)
    fault = check.fault(careful=False)
    assert (fault and fault.kind, fault and fault.place) == (kind, place)


@pytest.mark.parametrize("careful", [False, True])
def test_the_reading_is_taken_once(careful: bool) -> None:
    """What the guard judges before the step is what was read here, unless somebody has changed a gradient since."""
    loop, check = at_step()
    assert check.fault(careful=careful) is None
    loop.net.weight.grad.mul_(3.0)  # type: ignore[union-attr, operator]
    loop.guard.before_step(0)
    reading = loop.guard._parts.judge.readings[-1]
    once = 0.1 * math.sqrt(4)
    assert reading.loss == 1.0
    assert reading.grad_norm == pytest.approx(once if not careful else 0.1 * math.sqrt(3 * 9 + 1))


def test_nothing_is_read_where_readings_are_late() -> None:
    """The device would have to be waited for."""
    _, check = at_step(math.nan, settings=Settings(snapshot_every=4, deferred=True), fused=True)
    assert check.fault(careful=False) is None


def test_a_guard_that_observes_makes_no_step_again() -> None:
    """Nothing is run again."""
    assert at_step()[0].guard.context.acts_alone
    assert not at_step(settings=Settings(observe=True))[0].guard.context.acts_alone


def test_losses_of_micro_batches() -> None:
    """One that is not finite is found on the host before its backward pass."""
    _, check = at_step()
    assert check.fault_of_loss(torch.tensor(1.0)) is None
    assert check.fault_of_loss(None) is None
    assert check.fault_of_loss(torch.ones(2) * math.nan) is None
    fault = check.fault_of_loss(torch.tensor(math.inf))
    assert fault is not None
    assert fault.kind == "non_finite_loss"
    assert check.fault_of_gradients() is None


def test_an_exception_is_told_in_the_place_of_a_loss() -> None:
    """The next loss that is not finite stands for it."""
    loop, check = at_step(math.nan)
    check.raised(check.in_words(ValueError("loc is\n nan")))
    loop.guard.before_step(0)
    loop.guard.close_batch()
    assert loop.records[-1].message == "training_step raised ValueError: loc is nan"
    assert loop.guard.context.state.raised is None
