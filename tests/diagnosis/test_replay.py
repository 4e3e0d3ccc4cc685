"""A batch that is run again shows where a value that is not finite was made."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_nanguard import Clues
from lightning_nanguard.diagnosis.replay import loss_and_gradient_norm, replay

X = torch.tensor([[0.5], [0.0], [1.0]])


def linear() -> nn.Module:
    net = nn.Linear(1, 1, bias=False)
    nn.init.ones_(net.weight)
    return net


def test_a_finite_batch_has_its_loss_and_norms() -> None:
    """Loss, gradient norms by name, and nothing in ``.grad``; one forward pass is enough."""
    net, runs = linear(), []

    def step() -> Tensor:
        runs.append(1)
        return net(X).sum()

    clues = replay(Clues(), X, net, step, loss_scale=8.0)
    assert (clues.replayed, clues.loss, clues.gradient_finite, clues.norm) == (True, 1.5, True, 1.5)
    assert clues.norms == (("weight", 1.5),)
    assert clues.origin is None
    assert len(runs) == 1
    assert net.weight.grad is None


@pytest.mark.parametrize(
    ("loss", "operation", "backward"),
    [
        (lambda h: h.log().mean(), "log", False),
        (lambda h: torch.where(h > 0, h.sqrt(), 0.0).mean(), "sqrt", True),
    ],
    ids=["forward", "backward"],
)
def test_the_operation_and_its_sample_are_found(
    loss: Callable[[Tensor], Tensor], operation: str, backward: bool
) -> None:
    """Where the loss is not finite, or its gradient."""
    net = linear()
    clues = replay(Clues(), X, net, lambda: loss(net(X)))
    assert clues.origin is not None
    assert (clues.origin.operation, clues.origin.backward, clues.origin.samples) == (operation, backward, (1,))
    assert clues.origin.line.startswith("test_replay.py:")
    assert clues.gradient_finite is False


def test_a_step_without_a_loss_shows_nothing() -> None:
    """Nothing is known, and nothing raised."""
    assert replay(Clues(), X, linear(), lambda: None) == Clues()
    assert loss_and_gradient_norm(linear(), lambda: None) is None


def test_loss_and_gradient_norm() -> None:
    """Of one more run; a loss that is not finite has no gradient norm."""
    net = linear()
    assert loss_and_gradient_norm(net, lambda: net(X).sum()) == (1.5, 1.5)
    found = loss_and_gradient_norm(net, lambda: net(X).sum() * math.inf)
    assert found is not None
    assert found[0] == math.inf
    assert math.isnan(found[1])


class Check(nn.Module):
    """Raises where what it is given is not finite, or solves it."""

    def forward(self, h: Tensor) -> Tensor:
        made = h.log()
        if not bool(torch.isfinite(made).all()):
            raise FloatingPointError("not finite")
        return made


def solved(h: Tensor) -> Tensor:
    return torch.linalg.inv(h[:, :, None] * torch.ones(1, 1))


@pytest.mark.parametrize(
    ("loss", "operation"), [(Check(), "log"), (solved, "linalg_inv_ex")], ids=["a check", "an operation"]
)
def test_what_an_exception_is_about(loss: Callable[[Tensor], Tensor], operation: str) -> None:
    """The operation that made what a check has found, and the one that raised itself, with line and sample."""
    net = linear()
    clues = replay(Clues(), X, net, lambda: loss(net(X)).mean())
    assert clues.origin is not None
    assert (clues.origin.operation, clues.origin.samples) == (operation, (1,))
    assert clues.origin.line.startswith("test_replay.py:")
    assert clues.gradient_finite is False


def test_an_exception_about_something_else_shows_nothing() -> None:
    """No operation is made up."""

    def step() -> Tensor:
        raise KeyError("x")

    assert replay(Clues(), X, linear(), step).origin is None


def test_anomaly_detection_does_not_keep_from_looking() -> None:
    """It would raise at the NaN that is looked for; it is on again afterwards."""
    net = linear()
    with torch.autograd.set_detect_anomaly(True):
        clues = replay(Clues(), X, net, lambda: torch.where(net(X) > 0, net(X).sqrt(), 0.0).mean())
        assert torch.is_anomaly_check_nan_enabled()
    assert clues.origin is not None
    assert (clues.origin.operation, clues.origin.samples) == ("sqrt", (1,))
