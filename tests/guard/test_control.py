"""Branches are compared with a run only if they make its updates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_nanguard.guard.control import NOT_ALIKE, Control
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
