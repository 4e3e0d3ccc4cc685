"""Optimizers beside PyTorch's own: decay by group, and small ones of the kinds of Lion, Muon and SAM."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

Closure = Callable[[], Any] | None


def decay_groups(parameters: Iterable[Tensor], rate: float) -> Optimizer:
    """AdamW as language models use it: weights decay, biases and norms do not."""
    weights, rest = _by_dimension(parameters)
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return AdamW(groups, rate, betas=(0.9, 0.95))


def nesterov(parameters: Iterable[Tensor], rate: float) -> Optimizer:
    """SGD as residual nets use it."""
    return SGD(parameters, rate, momentum=0.9, nesterov=True, weight_decay=5e-4)


def _by_dimension(parameters: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    held = list(parameters)
    return [p for p in held if p.dim() > 1], [p for p in held if p.dim() < 2]


def _evaluate(closure: Closure) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


@final
class Lion(Optimizer):
    """Every weight moves by the sign of a momentum, and decays."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, weight_decay: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Closure = None) -> Any:  # type: ignore[override]
        loss = _evaluate(closure)
        for group in self.param_groups:
            near, far = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(momentum.lerp(p.grad, 1 - near).sign_(), alpha=group["lr"])
                momentum.lerp_(p.grad, 1 - far)
        return loss


def orthogonal(gradient: Tensor, rounds: int = 5) -> Tensor:
    """A matrix with the singular vectors of ``gradient`` and singular values near one (Newton and Schulz)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = gradient.flatten(1)
    turned = x.shape[0] > x.shape[1]
    x = x.T if turned else x
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if turned else x).view_as(gradient)


@final
class Muon(Optimizer):
    """Inner matrices move by an orthogonal momentum; the first, the last and what is no matrix by Adam's rule."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        weights, rest = _by_dimension(parameters)
        inner, outer = weights[1:-1], [weights[0], weights[-1], *rest]
        groups = [{"params": inner, "orthogonal": True}, {"params": outer, "orthogonal": False, "lr": lr / 5}]
        super().__init__(groups, {"lr": lr, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self, closure: Closure = None) -> Any:  # type: ignore[override]
        loss = _evaluate(closure)
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(self._direction(p, p.grad, group["orthogonal"]), alpha=group["lr"])
        return loss

    def _direction(self, p: Tensor, gradient: Tensor, is_orthogonal: bool) -> Tensor:
        state = self.state[p]
        if is_orthogonal:
            momentum = state.setdefault("momentum_buffer", torch.zeros_like(p)).lerp_(gradient, 0.05)
            rows, columns = p.flatten(1).shape
            return orthogonal(gradient.lerp(momentum, 0.95)) * max(1.0, rows / columns) ** 0.5
        if not state:
            state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        mean = state["exp_avg"].lerp_(gradient, 0.1)
        square = state["exp_avg_sq"].lerp_(gradient.square(), 0.05)
        count = float(state["step"])
        return mean / (1 - 0.9**count) / ((square / (1 - 0.95**count)).sqrt() + 1e-8)


@final
class SAM(Optimizer):
    """Momentum with the gradient of the worst point nearby: every step evaluates the batch twice."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, radius: float = 0.05) -> None:
        super().__init__(parameters, {"lr": lr, "radius": radius, "momentum": 0.9})

    @torch.no_grad()
    def step(self, closure: Closure = None) -> Any:  # type: ignore[override]
        if closure is None:
            raise RuntimeError("SAM evaluates the batch twice and needs a closure")
        loss = _evaluate(closure)
        moved = [(g, p, p.clone()) for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not moved:
            return loss
        norm = torch.stack([p.grad.norm() for _, p, _ in moved]).norm() + 1e-12
        for group, p, _ in moved:
            p.add_(p.grad * (group["radius"] / norm))
        _evaluate(closure)
        for group, p, before in moved:
            p.copy_(before)
            if p.grad is not None:
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.mul_(group["momentum"]).add_(p.grad)
                p.sub_(momentum, alpha=group["lr"])
        return loss


OWN: dict[str, Callable[[Iterable[Tensor], float], Optimizer]] = {
    "decay_groups": decay_groups,
    "nesterov": nesterov,
    "lion": Lion,
    "muon": Muon,
    "sam": SAM,
}
"""By name, each made from parameters and a rate."""
