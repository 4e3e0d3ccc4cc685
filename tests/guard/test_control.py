"""Branches are compared with a run only if they make its updates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_nanguard.guard.control import NOT_ALIKE, Control
from lightning_nanguard.guard.suspicions import Suspicions
from lightning_nanguard.types import Fault, Reading
from tests.guard.branching import BranchingLoop, branches


class Constrained(BranchingLoop):
    """Its weights are changed after each step, as by a callback."""

    def __init__(self, change: Callable[[nn.Module], None] | None, lr: float = 2.0) -> None:
        super().__init__(lr=lr)
        self.change = change

    def train(self, batch: Tensor) -> None:
        super().train(batch)
        if self.change is not None:
            with torch.no_grad():
                self.change(self.net)


def clip(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.clamp_(-0.02, 0.02)


def test_a_constrained_run_is_not_compared() -> None:
    """A trial ends without a result, no other one begins, and a receipt says why it was not measured."""
    loop = Constrained(clip)
    loop.run(120)
    (ended,) = loop.guard.context.trials.given
    assert (ended.outcome, ended.reason) == ("no result", NOT_ALIKE)
    assert loop.records == []
    parts = loop.guard._parts
    parts.beside.receipts.before(loop.step, skipped=False)
    assert loop.guard.context.receipts.given[-1].reason == NOT_ALIKE


def decay(net: nn.Module) -> None:
    for parameter in list(net.parameters())[:1]:
        parameter.mul_(0.5)


def shrink(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.mul_(0.99)


def test_weights_that_no_optimizer_trains_may_move() -> None:
    """A teacher that code outside of the step moves rules trials out, and no advice blames it."""
    loop = Constrained(lambda net: net.teacher.mul_(0.99))
    loop.net.teacher = nn.Parameter(torch.ones(()), requires_grad=False)
    loop.net.register_forward_hook(lambda net, _, out: out * net.teacher)
    loop.run(120)
    (ended,) = loop.guard.context.trials.given
    assert (ended.outcome, ended.reason) == ("no result", NOT_ALIKE)
    outside = loop.guard._parts.beside.control.outside
    assert outside is not None
    assert outside.parameters == ()


@pytest.mark.parametrize(("change", "farther"), [(shrink, False), (decay, True)])
def test_advice_names_the_weights_that_are_moved_outside(change: Callable[[nn.Module], None], *, farther: bool) -> None:
    """Writes outside of the step explain a suspicion, surely if they move weights farther than the step does."""
    loop = Constrained(change, lr=0.2)
    loop.run(50)
    parts = loop.guard._parts
    suspicions = Suspicions(loop.guard.context, loop, parts.investigator, parts.beside, parts.recorder)
    outside = parts.beside.control.outside
    assert outside is not None
    assert (outside.ratio > 1) is farther
    fault = Fault("collapsed", "learner", "loss", 2.0, "it rose", certain=False)
    suspicions.tell(fault, Reading(50, 0, 2.0, 1.0), (50, 0, 49))
    advice = loop.advice[-1]
    assert (advice.cause, advice.place) == ("weights_moved_outside", outside.parameters[0])
    assert (advice.confidence > 0.5) is farther
    assert f"moves the weights {outside.ratio:.3g} times as far" in advice.suggestion


def test_a_run_is_compared_if_its_updates_can_be_made_again() -> None:
    """The control follows for a number of updates, with the rate of each; it begins anew where the run is moved."""
    loop = BranchingLoop(lr=0.05)
    loop.run(30)
    context, made = loop.guard.context, branches(loop)
    control = Control(context, made)
    control.begin()
    followed = []
    for step in range(context.thresholds.trial.picked_after + 3):
        loop.optimizer.param_groups[0]["lr"] = 0.05 / (1 + step % 3)
        loop.run(1)
        loop.optimizer.param_groups[0]["lr"] = 1.0  # for the next step, as by a scheduler
        if step == 4:
            context.rate.set_multiplier(0.5)
        with made.beside(loop.step) as possible:
            assert possible
            assert control.follow(loop.step)
            assert control.follow(loop.step)  # once for each update
        followed.append(control._left)
    assert followed == [*range(15, -1, -1), 0, 0, 0]
    assert not control.failed
    assert control._branch is control._start is control._target is None, "its copies are released"
