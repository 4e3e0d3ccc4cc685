"""Further failing runs: exceptions, invalid rates, and mistakes as they stand in reinforcement learning, retrieval,
distillation, geometry and models of missing values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.nn import functional

from benchmarks.rescue import models

from .faulty import (
    INF,
    NAN,
    _marked,
    _moment,
    _one_bad_batch,
    _same,
    entropy,
    log_of_probability,
    log_of_sigmoid,
    squared,
)
from .problems import Dice, Form, Net, Problem

# ------------------------------------------------------------------------------------------------- invalid rates


def _rated(dice: Dice, factor: Any, place: str) -> Problem:
    """A run whose scheduler multiplies its rate by ``factor(update)``."""
    name = dice.choice(["sgd", "adam", "adamw"])
    rate = dice.near(2e-3)

    def make(net: nn.Module) -> Any:
        kind = {"sgd": optim.SGD, "adam": optim.Adam, "adamw": optim.AdamW}[name]
        made = kind(net.parameters(), rate)  # type: ignore[operator]
        scheduler = optim.lr_scheduler.LambdaLR(made, factor)
        return [made], [{"scheduler": scheduler, "interval": "step"}]

    module = Net(dice.mlp(64, 10), entropy, make)
    return Problem(module, dice.digits(40), "invalid_learning_rate", place, None, 80)


def past_its_end(dice: Dice) -> Problem:
    """A rate that falls in a line, and below zero where the run is longer."""
    steps = dice.randint(20, 60)
    return _rated(dice, lambda step: 1 - step / steps, "^LambdaLR, group 0$")


def warm_up_from_update_zero(dice: Dice) -> Problem:
    power = dice.choice([0.5, 1.0])
    return _rated(dice, lambda step: INF if step == 0 else step**-power, "^LambdaLR, group 0$")


def set_by_hand(dice: Dice) -> Problem:
    """A rate divided by the gradient's norm of a batch without one."""
    problem = _rated(dice, lambda step: 1.0, "^LambdaLR, group 0$")
    at, value = dice.randint(20, 60), dice.choice([NAN, INF])

    def disturb(step: int, module: nn.Module, optimizer: optim.Optimizer) -> None:
        if step == at:
            optimizer.param_groups[0]["lr"] = value

    problem.disturb = disturb
    return problem


# ----------------------------------------------------------------------------------------------------- exceptions


def distribution_that_validates(dice: Dice) -> Problem:
    """NaN in the data, of which a distribution says that it is no parameter."""

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        mean, scale = net(x).chunk(2, 1)
        return -torch.distributions.Normal(mean, functional.softplus(scale) + 0.1).log_prob(y).mean()

    def spoil(x: Tensor, y: Tensor) -> tuple[int, ...]:
        rows = dice.some(len(x))
        x[list(rows), dice.randrange(8)] = NAN
        return rows

    return _one_bad_batch(
        dice, "non_finite_input", loss, spoil, place="field 0 of the batch", samples=_same, net=dice.mlp(8, 4)
    )


def check_of_the_users(dice: Dice) -> Problem:
    """A probability that reaches zero, and a check that raises where the loss is infinite."""

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        value = log_of_probability(net, x, y)
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value}")
        return value

    return log_of_sigmoid(dice, loss)


def anomaly_mode(dice: Dice) -> Problem:
    """The distance of two equal points, under ``detect_anomaly``."""

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        apart = (net(x.clamp(-5, 5)) - y) * (x[:, :1] < 20)
        return apart.square().sum(1).sqrt().mean()

    return _one_bad_batch(
        dice, "sqrt_at_zero", loss, _marked(dice, 30.0), place=r"training_step \(backward of sqrt, further.py",
        samples=_same, net=dice.mlp(8, 2, norm=False, dropout=False), detect_anomaly=True,
    )  # fmt: skip


class Kernel(nn.Module):
    """The factor of a Gaussian process's covariance over the points of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        points = x.reshape(len(x), 4, 2) * self.scale.exp()
        apart = (points[:, :, None] - points[:, None]).square().sum(-1)
        return torch.linalg.cholesky(torch.exp(-apart))  # type: ignore[no-any-return]


def solver_that_fails(dice: Dice) -> Problem:
    """A covariance of two equal points has no factor, and torch raises."""

    def spoil(x: Tensor, y: Tensor) -> tuple[int, ...]:
        rows = dice.some(len(x), 3)
        for row in rows:
            x[row, 2:4] = x[row, :2]
        return rows

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return torch.log(torch.diagonal(net(x), dim1=1, dim2=2)).sum(1).square().mean()

    return _one_bad_batch(
        dice, "unknown_operation", loss, spoil, place=r"net \(linalg_cholesky_ex, further.py", samples=_same,
        net=Kernel(),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------- operations


def chosen_action(dice: Dice) -> Problem:
    """The logarithm of the probability of the action taken, of a policy that is sure of another."""

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        scores = net(x.clamp(-5, 5)) + torch.where(x[:, :1] > 20, torch.tensor([300.0, 0.0, 0.0]), 0.0)
        taken = y[:, :1].abs().long().clamp(0, 0) + 1
        return -(torch.log(functional.softmax(scores, -1).gather(1, taken)) * y[:, 1:2]).mean()

    return _one_bad_batch(
        dice, "log_of_zero", loss, _marked(dice, 30.0), place=r"training_step \(log, further.py", samples=_same,
        net=dice.mlp(8, 3, norm=False),
    )  # fmt: skip


def normalised_returns(dice: Dice) -> Problem:
    """Returns of an episode in which nothing happened, divided by their deviation."""

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return functional.smooth_l1_loss(net(x), (y - y.mean()) / y.std())

    def spoil(x: Tensor, y: Tensor) -> None:
        y.fill_(dice.choice([-1.0, 0.0, 1.0]))  # of which the mean is the same, to the last bit

    return _one_bad_batch(dice, "division_by_zero", loss, spoil, place=r"training_step \(div, further.py")


def no_other_sample(dice: Dice) -> Problem:
    """Similarities to all other samples of a batch that holds one."""
    at = _moment(dice)
    batches = dice.regression(at + 8)
    batches[at] = (batches[at][0][:1], batches[at][1][:1])

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        h = functional.normalize(net(x), dim=1)
        others = (h @ h.T / 0.2).masked_fill(torch.eye(len(h), dtype=torch.bool), -INF)
        return torch.logsumexp(others, 1).mean()

    net = dice.mlp(8, 4, norm=False)
    place = r"training_step \(logsumexp, further.py"
    return Problem(Net(net, loss, dice.optimizer()), batches, "division_by_zero", place, None, at + 8)


def whole_groups(dice: Dice) -> Problem:
    """A sum over the number of whole groups in a batch, of which a short one has none."""
    at, group = _moment(dice), 8
    batches = dice.regression(at + 8, size=2 * group)
    batches[at] = (batches[at][0][: group - 1], batches[at][1][: group - 1])

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (net(x) - y).square().sum() / (len(x) // group)

    module = Net(dice.mlp(8, 2), loss, dice.optimizer("adam", "adamw"))
    return Problem(module, batches, "division_by_zero", r"training_step \(div, further.py", None, at + 8)


def angle_at_one(dice: Dice) -> Problem:
    """The angle between two equal directions: the derivative of acos at 1."""

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        h = torch.tanh(net(x.clamp(-5, 5))) * 0.9
        cosine = torch.where(x[:, :1] > 20, 1.0 + 0.0 * h[:, :1], h[:, :1])
        return torch.acos(cosine).mean()

    return _one_bad_batch(
        dice, "sqrt_at_zero", loss, _marked(dice, 30.0), place=r"training_step \(backward of acos, further.py",
        samples=_same, net=dice.mlp(8, 2, norm=False, dropout=False),
    )  # fmt: skip


def angle_beyond_one(dice: Dice) -> Problem:
    """A cosine that rounding has brought above 1."""

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        h = torch.tanh(net(x.clamp(-5, 5))) * 0.9
        return torch.acos(h * (x[:, :1] < 20) + 1.000001 * (x[:, :1] > 20)).mean()

    return _one_bad_batch(
        dice, "unknown_operation", loss, _marked(dice, 30.0), place=r"training_step \(acos, further.py", samples=_same,
        net=dice.mlp(8, 2, norm=False, dropout=False),
    )  # fmt: skip


class Gamma(nn.Module):
    """A gamma correction of its inputs, and a body behind it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body((x + 8) ** (1 / 2.2))  # type: ignore[no-any-return]


def negative_pixel(dice: Dice) -> Problem:
    net = Gamma(dice.mlp(8, 2))
    return _one_bad_batch(
        dice, "unknown_operation", squared, _marked(dice, -dice.uniform(9, 20)), place=r"net \(pow, further.py",
        samples=_same, net=net,
    )  # fmt: skip


def singular_matrix(dice: Dice) -> Problem:
    """The logarithm of the determinant of a matrix with a row of zeros."""

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        matrix = net(x.clamp(-5, 5)).reshape(-1, 2, 2) * (x[:, :1, None] < 20) + torch.eye(2) * (x[:, :1, None] < 20)
        return functional.mse_loss(torch.linalg.slogdet(matrix)[1], y[:, 0])

    return _one_bad_batch(
        dice, "unknown_operation", loss, _marked(dice, 30.0), place=r"training_step \(linalg_slogdet, further.py",
        samples=_same, net=dice.mlp(8, 4, norm=False),
    )  # fmt: skip


def weight_of_an_absent_class(dice: Dice) -> Problem:
    """One over how often a class occurs, in a tensor that is no buffer; the class occurs late."""
    at = _moment(dice)
    batches = dice.digits(at + 8)
    for _, y in batches:
        y[y == 9] = 0
    rows = dice.some(len(batches[at][1]))
    batches[at][1][list(rows)] = 9
    weight = 1 / torch.tensor([9.0] * 9 + [0.0])
    module = Net(
        models.mlp(64, 32, 10), lambda net, x, y: functional.cross_entropy(net(x), y, weight), dice.optimizer("adam")
    )
    place = r"training_step \(nll_loss_forward, further.py"
    return Problem(module, batches, "non_finite_from_start", place, None, at + 8)


# ----------------------------------------------------------------------------------------------------------- data


def zero_in_a_distribution(dice: Dice) -> Problem:
    """The divergence from a teacher's probabilities, of which one is zero."""

    def prepare(x: Tensor, y: Tensor) -> None:
        y.copy_(functional.softmax(y, 1))

    def spoil(x: Tensor, y: Tensor) -> tuple[int, ...]:
        rows = dice.some(len(y))
        y[list(rows)] = torch.tensor([0.0, 1.0, 0.0])
        return rows

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (y * (torch.log(y) - functional.log_softmax(net(x), 1))).sum(1).mean()

    return _one_bad_batch(
        dice, "target_out_of_domain", loss, spoil, place=r"training_step \(log, further.py", samples=_same,
        prepare=prepare, outputs=3, net=dice.mlp(8, 3),
    )  # fmt: skip


class Bag(nn.Module):
    """A linear layer over sparse features."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(0.1 * torch.randn(features, 8)), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(torch.sparse.mm(x, self.weight)))  # type: ignore[no-any-return]


def sparse_feature(dice: Dice) -> Problem:
    """NaN among the values of a sparse batch."""
    at = _moment(dice)
    batches: list[Any] = [(x.to_sparse(), y) for x, y in dice.digits(at + 6, 16)]
    x = batches[at][0].coalesce()
    values = x.values().clone()
    spot = dice.randrange(len(values))
    values[spot] = NAN
    batches[at] = (torch.sparse_coo_tensor(x.indices(), values, x.shape, check_invariants=False), batches[at][1])
    rows = (int(x.indices()[0, spot]),)
    module = Net(Bag(64), entropy, dice.optimizer("adam"))
    return Problem(module, batches, "non_finite_input", "field 0 of the batch", rows, at + 6)


def missing_behind_where(dice: Dice) -> Problem:
    """Missing targets that ``torch.where`` leaves out of the loss, and not of its gradient."""

    def spoil(x: Tensor, y: Tensor) -> tuple[int, ...]:
        rows = dice.some(len(y))
        y[list(rows), 0] = NAN
        return rows

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return torch.where(y.isnan(), 0.0, (net(x) - y).square()).mean()

    return _one_bad_batch(dice, "non_finite_input", loss, spoil, place="field 1 of the batch", samples=_same)


# ------------------------------------------------------------------------------------------------ changed gradients


class Changes(Net):
    """A net whose own code changes a gradient behind the backward pass of one update."""

    def __init__(self, *parts: Any, at: int, change: Callable[[Tensor], Any]) -> None:
        super().__init__(*parts)
        self.at, self.change = at, change

    def on_after_backward(self) -> None:
        if self.trainer.global_step == self.at:
            last = [parameter.grad for parameter in self.net.parameters() if parameter.grad is not None][-1]
            self.change(last)


def _changed(dice: Dice, change: Callable[[Tensor], Any]) -> Problem:
    at = _moment(dice)
    module = Changes(dice.mlp(64, 10), entropy, dice.optimizer("adam"), at=at, change=change)
    return Problem(module, dice.digits(at + 6), "changed_gradient", "", None, at + 6)


def divided_by_its_count(dice: Dice) -> Problem:
    """A mean over the ranks that took part, of which there were none."""
    return _changed(dice, lambda gradient: gradient.div_(0.0))


def noise_of_a_log(dice: Dice) -> Problem:
    """Noise on a gradient, from a logarithm of a draw that may be zero."""
    return _changed(dice, lambda gradient: gradient.add_(torch.zeros_like(gradient).log()))


def unscaled_twice(dice: Dice) -> Problem:
    """A gradient that is multiplied by a scale which has overflowed."""
    return _changed(dice, lambda gradient: gradient.mul_(INF))


FURTHER: tuple[Form, ...] = tuple(
    Form(cause, make.__name__, make)
    for cause, makes in {
        "invalid_learning_rate": (past_its_end, warm_up_from_update_zero, set_by_hand),
        "exception_from_non_finite": (
            distribution_that_validates,
            check_of_the_users,
            anomaly_mode,
            solver_that_fails,
        ),
        "log_of_zero": (chosen_action,),
        "division_by_zero": (normalised_returns, no_other_sample, whole_groups),
        "sqrt_at_zero": (angle_at_one,),
        "unknown_operation": (angle_beyond_one, negative_pixel, singular_matrix),
        "non_finite_from_start": (weight_of_an_absent_class,),
        "target_out_of_domain": (zero_in_a_distribution,),
        "non_finite_input": (sparse_feature, missing_behind_where),
        "changed_gradient": (divided_by_its_count, noise_of_a_log, unscaled_twice),
    }.items()
    for make in makes
)
