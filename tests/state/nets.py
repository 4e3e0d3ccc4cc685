"""A network with every kind of state, and optimizers of every kind, for the tests of the state room."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_nanguard.state.learner import Learner


class Net(nn.Module):
    """Weights, batch norm, a mask of −inf, a buffer that is not persistent, tied and frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 4)
        self.tied = self.first
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("mask", torch.full((4,), -math.inf))
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.last(torch.relu(self.norm(self.first(x))))


class Wrapping(Optimizer):
    """Has another optimizer make the step, as SAM and Lookahead do; its own state holds a copy of each weight."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.01})
        self.base_optimizer = torch.optim.Adam(self.param_groups)
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["before"] = parameter.detach().clone()
        self.base_optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"state": [super().state_dict()["state"], self.base_optimizer.state_dict()["state"]]}


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.5, max_iter=3),
    "wrapping": Wrapping,
}


def made(name: str) -> tuple[Net, Optimizer, Learner]:
    """The network, an optimizer by its name, and the learner of both."""
    net = Net()
    optimizer = OPTIMIZERS[name]([p for p in net.parameters() if p.requires_grad])
    return net, optimizer, Learner(net, [optimizer])


def train(net: nn.Module, optimizer: Optimizer, steps: int, seed: int) -> None:
    """Make some updates on random data."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(6, 4, generator=draw)

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = (net(x) - x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def everything(net: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """All that a restore must bring back."""
    return {
        "weights": dict(net.named_parameters()),
        "buffers": dict(net.named_buffers()),
        "state": optimizer.state_dict()["state"],
    }
