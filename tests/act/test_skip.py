"""Skipping one optimizer's step, with optimizers of every kind and without a Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from lightning_nanguard.act.skip import StepSkipper, skips_on_device, unscales_itself
from lightning_nanguard.state.learner import Learner
from tests.helpers import Counting, Lookahead, copied, differences

Make = Callable[[list[nn.Parameter]], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: optim.AdamW(p, lr=0.01),
    "fused": lambda p: optim.AdamW(p, lr=0.01, fused=True),
    "lbfgs": lambda p: optim.LBFGS(p, lr=0.5, max_iter=4),
    "counts steps": lambda p: Counting(p, lr=0.05),
    "moves without gradients": lambda p: Lookahead(p, lr=0.05, momentum=0.9),
}


class Loop:
    """A plain training loop, whose step hook comes when the gradients are there."""

    def __init__(self, make: Make, scaler: torch.amp.GradScaler | None = None) -> None:
        torch.manual_seed(0)
        self.net = nn.Linear(3, 2)
        self.optimizer = make(list(self.net.parameters()))
        self.scaler = scaler
        self.learner = Learner(self.net, [self.optimizer], scaler)
        self.skipper = StepSkipper(self.learner)
        self.inputs = torch.arange(12.0).reshape(4, 3) / 12

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = (self.net(self.inputs) - 1).square().mean()
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss

    def step(self, *, skip: bool = False) -> None:
        def closure() -> Tensor:
            loss = self.closure()
            if skip:
                self.skipper.skip(0)
            self.skipper.remove_gradients(self.optimizer)
            return loss

        self.skipper.open()
        if self.scaler is None:
            self.optimizer.step(closure)
        else:
            closure()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.skipper.undo()

    def state(self) -> Any:
        return copied({"weights": dict(self.net.named_parameters()), "optimizer": self.optimizer.state_dict()})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_leaves_nothing_behind(name: str) -> None:
    """Weights, moments and step counts are those of before, at the first step and later, and the next one is made."""
    loop = Loop(OPTIMIZERS[name])
    for skip in (True, False, True, True, False):
        before = loop.state()
        loop.step(skip=skip)
        changed = differences(loop.state()["weights"], before["weights"]) != []
        assert changed is not skip
        if skip:
            assert differences(loop.state(), before) == []


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradscaler_skips_the_step_itself(fused: bool) -> None:
    """With a GradScaler the step is skipped too: where it insists on gradients, one of them is made infinite."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    loop = Loop(lambda p: optim.Adam(p, lr=0.1, fused=fused), scaler)
    loop.step()
    before = loop.state()
    loop.closure()
    loop.skipper.open()
    loop.skipper.skip(0)
    loop.skipper.remove_gradients(loop.optimizer)
    assert (loop.net.weight.grad is not None) is fused
    if fused:
        assert math.isinf(float(loop.net.weight.grad.flatten()[0]))
        scaler.step(loop.optimizer)
    else:
        loop.optimizer.step()
    assert differences(loop.state(), before) == []


def test_only_the_skipped_optimizer_loses_its_gradients() -> None:
    """Another optimizer of the same batch steps as usual."""
    nets = [nn.Linear(1, 1), nn.Linear(1, 1)]
    optimizers = [optim.SGD(net.parameters(), lr=0.1) for net in nets]
    skipper = StepSkipper(Learner(nn.ModuleList(nets), optimizers))
    sum(net(torch.ones(1, 1)).sum() for net in nets).backward()
    skipper.open()
    skipper.skip(1)
    for optimizer in optimizers:
        skipper.remove_gradients(optimizer)
    assert nets[0].weight.grad is not None
    assert nets[1].weight.grad is None
    skipper.open()
    assert skipper.skipped == set()


def test_which_optimizers_skip_on_the_device() -> None:
    """Fused optimizers do, unless a checkpoint has turned their fused steps off."""
    net = nn.Linear(2, 2)
    fused, plain = (optim.AdamW(net.parameters(), fused=fused) for fused in (True, False))
    assert skips_on_device(fused)
    assert not skips_on_device(plain)
    assert not unscales_itself(plain)
    fused.load_state_dict(plain.state_dict())
    assert unscales_itself(fused)
    assert not skips_on_device(fused)


@pytest.mark.parametrize(("fused", "momentum"), [(True, 0.9), (True, 0.0), (False, 0.9)])
def test_the_first_step_of_fused_momentum_is_not_left_to_the_device(fused: bool, momentum: float) -> None:
    """Momentum that a skipped step would have begun is uninitialised memory; once it is there, the device may skip."""
    loop = Loop(lambda p: optim.SGD(p, lr=0.1, momentum=momentum, fused=fused))
    loop.closure()
    risky = fused and momentum > 0
    assert loop.skipper.device_cannot_skip(0) is risky
    loop.step()
    assert not loop.skipper.device_cannot_skip(0)
    loop.optimizer.load_state_dict({**loop.optimizer.state_dict(), "state": {}})
    assert loop.skipper.device_cannot_skip(0) is risky
