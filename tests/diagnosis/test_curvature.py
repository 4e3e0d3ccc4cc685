"""Products with the Hessian, the rate they allow, and the ends of its spectrum."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_nanguard.diagnosis.curvature import (
    Hessian,
    curvature_along_update,
    dot,
    extreme_eigenvalues,
    steepest,
    typical,
    update_direction,
)


class Attention(nn.Module):
    """Self-attention whose kernel may have no second derivative."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.reshape(2, 1, 4, 6)
        return F.scaled_dot_product_attention(heads, heads, heads).reshape(8, 6)


class Once(torch.autograd.Function):
    """The identity, which can be differentiated once only."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


class OnceModule(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)


def problem(net: nn.Module) -> Callable[[], Tensor]:
    x, y = torch.randn(8, 6), torch.randn(8, 2)
    return lambda: (net(x) - y).square().mean()


def mlp(*middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), *middle, nn.Tanh(), nn.Linear(6, 2))


def exact(step: Callable[[], Tensor], parameters: list[Tensor]) -> Tensor:
    """The whole Hessian, row by row."""
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(step(), parameters, create_graph=True)])
    rows = [torch.autograd.grad(one, parameters, retain_graph=True) for one in gradient]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


@pytest.mark.parametrize("middle", [nn.Identity(), OnceModule(), Attention()], ids=["double", "once", "attention"])
def test_products_are_those_of_the_whole_hessian(middle: nn.Module) -> None:
    """By double backward, and by finite differences where an operation can be differentiated once only."""
    net = mlp(middle)
    step, parameters = problem(net), list(net.parameters())
    reference = mlp(nn.Identity() if isinstance(middle, OnceModule) else middle)
    torch.manual_seed(1)
    step = problem(net)
    torch.manual_seed(1)
    with sdpa_kernel(SDPBackend.MATH):
        matrix = exact(problem(reference), list(reference.parameters()))
    hessian = Hessian(step, parameters)
    vector = [torch.randn_like(parameter) for parameter in parameters]
    product = torch.cat([one.flatten() for one in hessian.times(vector)])
    expected = matrix @ torch.cat([one.flatten() for one in vector])
    torch.testing.assert_close(product, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_finite_differences_put_the_weights_back() -> None:
    """The weights are bit for bit as before, also where the loss cannot be had in the middle."""
    net = mlp(OnceModule())
    before = [parameter.detach().clone() for parameter in net.parameters()]
    step, count = problem(net), 0

    def failing() -> Tensor:
        nonlocal count
        count += 1
        if count == 4:
            raise RuntimeError("no more")
        return step()

    hessian = Hessian(failing, list(net.parameters()))
    with pytest.raises(RuntimeError, match="no more"):
        hessian.times(hessian.gradient)
    assert all(torch.equal(one, other) for one, other in zip(before, net.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_above_the_stable_rate_the_loss_rises() -> None:
    """Just below the rate a step along the gradient lowers a quadratic loss, just above it raises it."""
    w = torch.randn(10, generator=torch.Generator().manual_seed(0), requires_grad=True)
    scales = torch.logspace(-2, 2, 10)

    def loss(at: Tensor) -> Tensor:
        return 0.5 * (scales * at.square()).sum()

    rate = Hessian(lambda: loss(w), [w]).along().largest_rate
    assert rate is not None
    gradient = scales * w
    assert loss(w - 0.99 * rate * gradient) < loss(w) < loss(w - 1.01 * rate * gradient)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: optim.SGD(p, lr=1e-3),
        lambda p: optim.Adam(p, lr=1e-3, betas=(0.0, 0.999)),
        lambda p: optim.RMSprop(p, lr=1e-3),
        lambda p: optim.Adagrad(p, lr=1e-3),
    ],
    ids=["sgd", "adam", "rmsprop", "adagrad"],
)
def test_the_direction_is_that_of_the_next_update(make: Callable[[list[nn.Parameter]], optim.Optimizer]) -> None:
    """Without momentum the next update is nearly the rate times the direction."""
    net = mlp()
    parameters = list(net.parameters())
    optimizer, step = make(parameters), problem(net)
    for _ in range(20):
        optimizer.zero_grad()
        step().backward()
        optimizer.step()
    gradient = list(torch.autograd.grad(step(), parameters))
    moved = update_direction(optimizer, gradient, parameters)
    assert moved is not None
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.zero_grad()
    step().backward()
    optimizer.step()
    made = [(one - other) / 1e-3 for one, other in zip(before, parameters, strict=True)]
    assert dot(made, moved) / (dot(made, made) * dot(moved, moved)) ** 0.5 > 0.99
    assert dot(made, made) == pytest.approx(dot(moved, moved), rel=0.1)


@pytest.mark.parametrize(
    ("kind", "settings", "along"),
    [
        (optim.SGD, {}, "the gradient"),
        (optim.SGD, {"momentum": 0.9}, "the gradient, without momentum,"),
        (optim.Adam, {}, "the updates of Adam, without momentum,"),
        (optim.RMSprop, {}, "the updates of RMSprop"),
    ],
)
def test_the_direction_has_a_name(kind: Any, settings: dict[str, float], along: str) -> None:
    """It says what the direction leaves out."""
    net = mlp()
    found = curvature_along_update(problem(net), kind(net.parameters(), **settings), dict(net.named_parameters()))
    assert found is not None
    assert found[0].along == along


def test_an_unknown_optimizer_has_no_direction() -> None:
    """Nothing is said about a rate whose updates are not known."""
    net = mlp()
    assert curvature_along_update(problem(net), optim.LBFGS(net.parameters()), dict(net.named_parameters())) is None


def test_the_ends_of_the_spectrum_are_those_of_the_whole_hessian() -> None:
    """Smallest and largest eigenvalue by Lanczos, and the steepest direction by power iteration."""
    net = mlp()
    step, parameters = problem(net), list(net.parameters())
    values = torch.linalg.eigvalsh(exact(step, parameters))
    hessian = Hessian(step, parameters)
    smallest, largest = extreme_eigenvalues(hessian)
    assert largest == pytest.approx(float(values[-1]), rel=0.05)
    assert smallest == pytest.approx(float(values[0]), rel=0.1)
    steep, top = steepest(hessian, 10)
    assert steep == pytest.approx(float(values[-1]), rel=0.2)
    assert typical(hessian, top) < steep


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install; the rate that the curvature allows needs no extra."""
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    net = mlp()
    step, parameters = problem(net), list(net.parameters())
    with pytest.raises(ModuleNotFoundError, match=r"lightning-nanguard\[curvature\]"):
        extreme_eigenvalues(Hessian(step, parameters))
    assert Hessian(step, parameters).along().largest_rate is not None


def test_a_loss_without_weights_is_refused() -> None:
    """A loss that does not depend on the weights has no curvature."""
    with pytest.raises(ValueError, match="no loss that depends on the parameters"):
        Hessian(lambda: torch.tensor(1.0), [torch.ones(2, requires_grad=True)])


def test_no_random_number_is_drawn() -> None:
    """The random streams are as before."""
    net = mlp()
    hessian = Hessian(problem(net), list(net.parameters()))
    before = torch.get_rng_state()
    _, top = steepest(hessian)
    typical(hessian, top)
    extreme_eigenvalues(hessian)
    assert torch.equal(before, torch.get_rng_state())


def test_a_gradient_that_is_not_finite_has_no_curvature() -> None:
    """Nothing is said of the updates that it would make."""
    net = nn.Linear(2, 1)
    sgd = optim.SGD(net.parameters(), 0.1)
    assert curvature_along_update(lambda: net(torch.ones(1, 2)).sum() / 0, sgd, dict(net.named_parameters())) is None
