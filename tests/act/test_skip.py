"""Skipping one optimizer's step, with optimizers of every kind and without a Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from lightning_nanguard.act import skip
from lightning_nanguard.act.learning_rate import LearningRate
from lightning_nanguard.act.skip import StepSkipper, skips_on_device, unscales_itself
from lightning_nanguard.state.device import OutOfMemory
from lightning_nanguard.state.learner import Learner
from tests.fake_device import fake_device
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
    for skipped in (True, False, True, True, False):
        before = loop.state()
        loop.step(skip=skipped)
        changed = differences(loop.state()["weights"], before["weights"]) != []
        assert changed is not skipped
        if skipped:
            assert differences(loop.state(), before) == []


class Graph:
    """Writes gradients in place, as a captured graph does: it never looks whether ``grad`` is still there."""

    def __init__(self, loop: Loop) -> None:
        self.places = [torch.zeros_like(p) for p in loop.net.parameters()]
        for parameter, place in zip(loop.net.parameters(), self.places, strict=True):
            parameter.grad = place

    def replay(self, value: float) -> None:
        for place in self.places:
            place.fill_(value)


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradscaler_learns_nothing_from_a_skip(fused: bool) -> None:
    """A finite gradient that is kept from the weights is no overflow: the loss scale stays, and so do the gradients."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loop = Loop(lambda p: optim.AdamW(p, lr=0.1, fused=fused), scaler)
    learning_rate = LearningRate([loop.optimizer])
    learning_rate.attach(loop.skipper.remove_gradients, loop.skipper.return_gradients)
    loop.step()
    for unscale in (False, True):
        before = loop.state()
        loop.closure()
        gradient = loop.net.weight.grad
        loop.skipper.open()
        loop.skipper.skip(0)
        if unscale and not fused:
            scaler.unscale_(loop.optimizer)
        scaler.step(loop.optimizer)
        scaler.update()
        assert differences(loop.state(), before) == []
        assert loop.net.weight.grad is gradient
        assert scaler.get_scale() == 1024.0


@pytest.mark.parametrize("name", ["sgd", "adamw", "fused", "counts steps"])
def test_gradients_are_where_they_were_after_a_skip(name: str) -> None:
    """Training goes on where gradients are written in place; without them the optimizer would do nothing at all."""
    loop = Loop(OPTIMIZERS[name])
    LearningRate([loop.optimizer]).attach(loop.skipper.remove_gradients, loop.skipper.return_gradients)
    graph = Graph(loop)
    for skipped in (False, True, False, True, True, False):
        before = loop.state()["weights"]
        loop.skipper.open()
        graph.replay(math.nan if skipped else 0.5)
        if skipped:
            loop.skipper.skip(0)
        loop.optimizer.step()
        loop.skipper.undo()
        assert (differences(loop.state()["weights"], before) == []) is skipped
        assert [id(p.grad) for p in loop.net.parameters()] == [id(place) for place in graph.places]


def test_new_gradients_stay() -> None:
    """What a closure has made since a removal is not replaced by what was removed."""
    loop = Loop(OPTIMIZERS["sgd"])
    for _ in range(2):
        loop.closure()
        loop.skipper.skipped.add(0)
        loop.skipper.remove_gradients(loop.optimizer)
    loop.net.weight.grad = newest = torch.ones(2, 3)
    loop.skipper.return_gradients()
    assert loop.net.weight.grad is newest
    assert loop.net.bias.grad is not None


@pytest.mark.parametrize(("fails", "said"), [((None,), False), ((None, "cpu"), True)])
def test_a_full_device_does_not_end_a_skip(
    fails: tuple[Any, ...], said: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The copy that an unknown optimizer needs goes to the host then; where that is full too, it is left out once."""
    real = skip.capture

    def capture(*args: Any, device: torch.device | None, **options: Any) -> Any:
        if (device if device is None else device.type) in fails:
            raise OutOfMemory("no room")
        return real(*args, device=device, **options)

    monkeypatch.setattr(skip, "capture", capture)
    loop = Loop(OPTIMIZERS["counts steps"])
    for skipped in (False, True, True, False):
        before = loop.state()
        loop.step(skip=skipped)
        assert (differences(loop.state()["weights"], before["weights"]) == []) is skipped
        if skipped and not said:
            assert differences(loop.state(), before) == []
    assert caplog.text.count("not enough memory for a copy of what Counting may change") == said


def test_copies_go_where_snapshots_go() -> None:
    """A copy that a skip needs takes no room on a device that is full."""
    loop = Loop(OPTIMIZERS["counts steps"])
    loop.learner.device, driver = fake_device()
    skipper = StepSkipper(loop.learner, lambda: torch.device("cpu"))
    loop.closure()
    before = loop.state()
    skipper.skip(0)
    assert driver.pinned
    loop.optimizer.param_groups[0]["lr"] = 0.1
    skipper.remove_gradients(loop.optimizer)
    loop.optimizer.step()
    skipper.undo()
    assert differences(loop.state()["weights"], before["weights"]) == []


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
    """Torch's own fused ones do, unless a checkpoint has turned their fused steps off; nobody else is known to."""
    net = nn.Linear(2, 2)
    fused, plain = (optim.AdamW(net.parameters(), fused=fused) for fused in (True, False))
    assert skips_on_device(fused)
    assert not skips_on_device(plain)
    assert not unscales_itself(plain)
    for kind in (optim.Adam, optim.SGD, optim.Adagrad):
        assert skips_on_device(kind(net.parameters(), lr=0.1, fused=True))

    class Own(optim.AdamW):
        pass

    class Foreign(optim.Optimizer):  # as those of TransformerEngine, which take a scaler and read no flag
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 0.1})
            self._step_supports_amp_scaling = True

    assert not skips_on_device(Own(net.parameters(), fused=True))
    assert unscales_itself(Foreign(net.parameters()))
    assert not skips_on_device(Foreign(net.parameters()))
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
