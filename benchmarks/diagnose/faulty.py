"""Runs that go non-finite or diverge: the guard names their cause at its first intervention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn, optim
from torch.nn import functional
from torch.optim import Optimizer

from benchmarks.rescue import data as sets
from benchmarks.rescue import models

from .problems import Dice, Form, Loss, Net, Pair, Problem

NAN, INF = math.nan, math.inf


def squared(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.mse_loss(net(x), y)


def entropy(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(net(x), y)


def _moment(dice: Dice) -> int:
    return dice.randint(12, 40)


def _one_bad_batch(
    dice: Dice,
    cause: str,
    loss: Loss,
    spoil: Callable[[Tensor, Tensor], Any],
    *,
    place: str = "",
    samples: Callable[[Any], tuple[int, ...] | None] = lambda rows: None,
    net: nn.Module | None = None,
    prepare: Callable[[Tensor, Tensor], Any] = lambda x, y: None,
    outputs: int = 2,
    **options: Any,
) -> Problem:
    """A regression of which one batch is spoilt."""
    at = _moment(dice)
    batches = dice.regression(at + 8, outputs=outputs)
    for x, y in batches:
        prepare(x, y)
    rows = spoil(*batches[at])
    module = Net(dice.mlp(8, outputs) if net is None else net, loss, dice.optimizer())
    return Problem(module, batches, cause, place, samples(rows), at + 8, options=options)


# ------------------------------------------------------------------------------------------------------ the data


def _bad_cells(dice: Dice, value: float, where: int) -> Callable[[Tensor, Tensor], tuple[int, ...]]:
    def spoil(x: Tensor, y: Tensor) -> tuple[int, ...]:
        target = (x, y)[where]
        rows = dice.some(len(target))
        columns = dice.some(target.shape[1], 2)
        for row in rows:
            for column in columns:
                target[row, column] = value
        return rows

    return spoil


def _same(rows: tuple[int, ...]) -> tuple[int, ...]:
    return rows


def bad_input(dice: Dice) -> Problem:
    value = dice.choice([NAN, INF, -INF])
    place = r"field 0 of the batch"
    return _one_bad_batch(dice, "non_finite_input", squared, _bad_cells(dice, value, 0), place=place, samples=_same)


def bad_label(dice: Dice) -> Problem:
    value = dice.choice([NAN, INF])
    place = r"field 1 of the batch"
    return _one_bad_batch(dice, "non_finite_input", squared, _bad_cells(dice, value, 1), place=place, samples=_same)


def bad_image(dice: Dice) -> Problem:
    at = _moment(dice)
    batches: list[Any] = [{"input": x, "label": y} for x, y in dice.digits(at + 6)]
    rows = dice.some(len(batches[at]["input"]))
    for row in rows:
        batches[at]["input"][row, dice.randrange(64)] = NAN
    module = Net(models.cnn(), entropy, dice.optimizer("adam", "momentum"))
    return Problem(module, batches, "non_finite_input", "field input of the batch", rows, at + 6)


def bad_window(dice: Dice) -> Problem:
    at = 2 * dice.randint(6, 18) + dice.randint(0, 1)
    batches = dice.digits(at + 8)
    rows = dice.some(len(batches[at][0]))
    for row in rows:
        batches[at][0][row].fill_(NAN)
    module = Net(models.Recurrent(nn.GRU, 8, 16, 10), entropy, dice.optimizer("adam"))
    options = {"accumulate_grad_batches": 2}
    return Problem(module, batches, "non_finite_input", "field 0 of the batch", rows, (at + 8) // 2, options=options)


def _positive(x: Tensor, y: Tensor) -> None:
    y.abs_().add_(0.2)


def _bad_targets(dice: Dice, low: float, high: float) -> Callable[[Tensor, Tensor], tuple[int, ...]]:
    def spoil(x: Tensor, y: Tensor) -> tuple[int, ...]:
        rows = dice.some(len(y))
        for row in rows:
            y[row, dice.randrange(y.shape[1])] = dice.uniform(low, high)
        return rows

    return spoil


def log1p_of_target(dice: Dice) -> Problem:
    return _one_bad_batch(
        dice, "target_out_of_domain", lambda net, x, y: functional.mse_loss(net(x), torch.log1p(y)),
        _bad_targets(dice, -6, -1.5), place=r"training_step \(log1p, faulty.py", samples=_same, prepare=_positive,
    )  # fmt: skip


def root_of_target(dice: Dice) -> Problem:
    return _one_bad_batch(
        dice, "target_out_of_domain", lambda net, x, y: functional.l1_loss(net(x), y.sqrt()),
        _bad_targets(dice, -3, -0.1), place=r"training_step \(sqrt, faulty.py", samples=_same, prepare=_positive,
    )  # fmt: skip


def log_of_target(dice: Dice) -> Problem:
    return _one_bad_batch(
        dice, "target_out_of_domain", lambda net, x, y: functional.smooth_l1_loss(net(x), y.log()),
        _bad_targets(dice, 0, 0), place=r"training_step \(log, faulty.py", samples=_same, prepare=_positive,
    )  # fmt: skip


def far_target(dice: Dice) -> Problem:
    value = dice.choice([-1, 1]) * 10 ** dice.uniform(12, 25)
    return _one_bad_batch(
        dice, "target_out_of_domain", squared, _bad_targets(dice, value, value), place="field 1 of the batch",
        samples=_same,
    )  # fmt: skip


def raw_pixels(dice: Dice) -> Problem:
    """Finite, and slow: before the first step it is seen, in the run it is not proved."""
    return _pixels(dice, models.linear(64, 10), 5, "preflight")


def raw_pixels_that_shut_units(dice: Dice) -> Problem:
    """Weights that start small hide the scale at first; the first updates shut every rectifier."""
    return _pixels(dice, models.small_start(), 120, "examine")


def _pixels(dice: Dice, net: nn.Module, steps: int, look: Literal["preflight", "examine"]) -> Problem:
    x, y = sets.pixels().train
    batches = [(x[i : i + 32], y[i : i + 32]) for i in range(0, 1184, 32)]
    rate = dice.near(0.03)
    module = Net(net, entropy, lambda net: optim.SGD(net.parameters(), rate))
    return Problem(module, batches, "unnormalised_input", "field 0 of the batch", None, steps, look)


def large_mean(dice: Dice) -> Problem:
    batches = dice.regression(50)
    shift = dice.near(300, 2)
    for x, _ in batches:
        x.add_(shift)
    net = dice.choice([lambda: nn.Linear(8, 2), lambda: models.mlp(8, 16, 2)])()
    rate = dice.near(0.02)
    module = Net(net, squared, lambda net: optim.SGD(net.parameters(), rate))
    return Problem(module, batches, "unnormalised_input", "field 0 of the batch", None, 50)


def raw_units(dice: Dice) -> Problem:
    scales = torch.tensor([10 ** dice.uniform(0, 4) for _ in range(8)])
    scales[dice.randrange(8)] = 10 ** dice.uniform(3.3, 4)
    batches = [(x * scales + scales, y) for x, y in dice.regression(50)]
    rate = dice.near(0.01)
    module = Net(models.mlp(8, 24, 2), squared, lambda net: optim.SGD(net.parameters(), rate))
    return Problem(module, batches, "unnormalised_input", "field 0 of the batch", None, 50)


def far_sample(dice: Dice) -> Problem:
    def spoil(x: Tensor, y: Tensor) -> tuple[int, ...]:
        row = dice.randrange(len(x))
        x[row] *= 10 ** dice.uniform(12, 16)
        return (row,)

    net = dice.choice([lambda: nn.Linear(8, 2), lambda: models.mlp(8, 16, 2)])()
    return _one_bad_batch(
        dice, "unnormalised_input", squared, spoil, place="field 0 of the batch", samples=_same, net=net
    )


# ---------------------------------------------------------------------------------------------------- operations


def _marked(dice: Dice, value: float) -> Callable[[Tensor, Tensor], tuple[int, ...]]:
    """Mark samples by their first column, so that a loss of the user's leaves its domain there."""

    def spoil(x: Tensor, y: Tensor) -> tuple[int, ...]:
        rows = dice.some(len(x), 3)
        for row in rows:
            x[row, 0] = value
        return rows

    return spoil


class LogSoftmaxByHand(nn.Module):
    """The log of a softmax, which reaches zero where the scores lie far apart."""

    def forward(self, h: Tensor) -> Tensor:
        return torch.log(torch.softmax(h, 1))


class Sharp(nn.Module):
    """Scores of a body, far apart where the input is marked."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.clamp(-5, 5))
        return self.head(h + torch.where(x[:, :1] > 20, torch.tensor([500.0, -500.0]), 0.0))


def log_of_softmax(dice: Dice) -> Problem:
    net = Sharp(dice.mlp(8, 2, norm=False), LogSoftmaxByHand())
    return _one_bad_batch(
        dice, "log_of_zero", lambda net, x, y: -net(x).mean(), _marked(dice, 30.0),
        place=r"net\.head \(log, faulty.py", samples=_same, net=net,
    )  # fmt: skip


def log_of_probability(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    p = torch.sigmoid(net(x.clamp(-5, 5)) - 200 * (x[:, :1] > 20))
    return -torch.log(p).mean()


def log_of_sigmoid(dice: Dice, loss: Loss = log_of_probability) -> Problem:
    return _one_bad_batch(
        dice, "log_of_zero", loss, _marked(dice, 30.0), place=r"training_step \(log, faulty.py", samples=_same,
        net=dice.mlp(8, 2, norm=False),
    )  # fmt: skip


def log_behind_where(dice: Dice) -> Problem:
    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        h = net(x.clamp(-5, 5))
        size = (h.abs() + 0.1) * (x[:, :1] < 20)
        return functional.mse_loss(h, y) + 0.01 * torch.where(size > 0, torch.log(size), 0.0).square().mean()

    return _one_bad_batch(
        dice, "log_of_zero", loss, _marked(dice, 30.0), place=r"training_step \(backward of log, faulty.py",
        samples=_same, net=dice.mlp(8, 2, norm=False, dropout=False),
    )  # fmt: skip


def entropy_by_hand(dice: Dice) -> Problem:
    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        p = torch.softmax(net(x.clamp(-5, 5)) * (1 + 1e4 * (x[:, :1] > 20)), 1)
        return functional.mse_loss(p, y.softmax(1)) - 0.01 * (p * torch.log2(p)).sum(1).mean()

    return _one_bad_batch(
        dice, "log_of_zero", loss, _marked(dice, 30.0), place=r"training_step \(log2, faulty.py", net=dice.mlp(8, 3),
        outputs=3,
    )  # fmt: skip


def _learned(
    dice: Dice, cause: str, loss: Loss, place: str, make: Callable[[nn.Module], Optimizer], outputs: int = 10
) -> Problem:
    """A model at a good rate, of which the scores grow until a loss written by hand holds them no more."""
    net = models.mlp(64, dice.choice([64, 96, 128]), outputs)
    return Problem(Net(net, loss, make), dice.digits(400, 32), cause, place, None, 400)


def sure_of_the_right_one(dice: Dice) -> Problem:
    """The logarithm of every probability: zero is among them, and is left out only after."""

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        p = torch.softmax(3 * net(x), 1)
        return -torch.log(p)[torch.arange(len(y)), y].mean()

    rate = dice.near(0.1, 1.2)
    make = lambda net: optim.SGD(net.parameters(), rate, momentum=0.9)  # noqa: E731
    return _learned(dice, "log_of_zero", loss, r"training_step \((backward of )?log, faulty.py", make)


def sure_enough(dice: Dice) -> Problem:
    """A model that learns comes to be sure, and the logarithm of the rest is that of zero."""

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        p = torch.sigmoid(8 * net(x))
        hot = functional.one_hot(y, 10)
        return -(hot * torch.log(p) + (1 - hot) * torch.log(1 - p)).mean()

    rate = dice.near(6e-3, 1.2)
    make = lambda net: optim.Adam(net.parameters(), rate)  # noqa: E731
    return _learned(dice, "log_of_zero", loss, r"training_step \(log, faulty.py", make)


class SoftmaxByHand(nn.Module):
    """Exponentials over their sum."""

    def forward(self, h: Tensor) -> Tensor:
        e = h.exp()
        return e / e.sum(1, keepdim=True)


def softmax_by_hand(dice: Dice) -> Problem:
    """A gate made of the inputs themselves, behind a normalisation of the rest."""
    net = nn.Sequential(nn.Identity(), SoftmaxByHand(), nn.Linear(8, 16), dice.act(), nn.Linear(16, 2))
    return _one_bad_batch(
        dice, "exp_overflow", squared, _marked(dice, dice.uniform(95, 900)), place=r"net\.1 \(exp, faulty.py",
        samples=_same, net=net,
    )  # fmt: skip


def self_similar(dice: Dice) -> Problem:
    """Attention of the samples to each other by hand, of scores without a norm, at a low temperature."""
    temperature = dice.uniform(0.03, 0.06)

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        h = net(x)
        e = torch.exp(h @ h.T / temperature)
        return functional.cross_entropy(4 * (e / e.sum(1, keepdim=True)) @ h, y)

    rate = dice.near(3e-3, 1.2)
    make = lambda net: optim.Adam(net.parameters(), rate)  # noqa: E731
    return _learned(dice, "exp_overflow", loss, r"training_step \(exp, faulty.py", make)


def poisson(dice: Dice) -> Problem:
    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        rate = net(x.clamp(-5, 5)) + x[:, :1].relu()
        return (torch.exp(rate) - y.abs() * rate).mean()

    return _one_bad_batch(
        dice, "exp_overflow", loss, _marked(dice, dice.uniform(120, 900)), place=r"training_step \(exp, faulty.py",
        samples=_same, net=dice.mlp(8, 2, norm=False),
    )  # fmt: skip


class Variance(nn.Module):
    """A variance out of its logarithm."""

    def forward(self, h: Tensor) -> Tensor:
        mean, log_variance = h.chunk(2, 1)
        return torch.cat([mean, torch.exp(log_variance)], 1)


class Shifted(nn.Module):
    """Adds the first column of the input to what a body says."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.clamp(-5, 5)) + x[:, :1].clamp(min=4) - 4)


def variance(dice: Dice) -> Problem:
    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        mean, spread = net(x).chunk(2, 1)
        return ((mean - y).square() / (1 + spread) + torch.log1p(spread)).mean()

    return _one_bad_batch(
        dice, "exp_overflow", loss, _marked(dice, dice.uniform(120, 900)), place=r"net\.head \(exp, faulty.py",
        samples=_same, net=Shifted(dice.mlp(8, 4, norm=False), Variance()),
    )  # fmt: skip


def _constant(x: Tensor, y: Tensor) -> None:
    x.fill_(0.5)


def standardised_by_hand(dice: Dice) -> Problem:
    class Standard(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.mean(0)) / x.std(0)

    net = nn.Sequential(Standard(), nn.Linear(8, 16), dice.act(), nn.Linear(16, 2))
    return _one_bad_batch(dice, "division_by_zero", squared, _constant, place=r"net\.0 \(div, faulty.py", net=net)


def empty_mask(dice: Dice) -> Problem:
    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        h, used = net(x.clamp(-5, 5)), (x[:, :1] < 20).float()
        return ((h - y).square() * used).sum() / (used.sum() * y.shape[1])

    def spoil(x: Tensor, y: Tensor) -> None:
        x[:, 0] = 50

    return _one_bad_batch(dice, "division_by_zero", loss, spoil, place=r"training_step \(div, faulty.py")


def mean_of_nothing(dice: Dice) -> Problem:
    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        h = net(x.clamp(-5, 5))
        return functional.mse_loss(h, y) + (h - y)[x[:, 0] < 20].abs().mean()

    def spoil(x: Tensor, y: Tensor) -> None:
        x[:, 0] = 50

    return _one_bad_batch(dice, "division_by_zero", loss, spoil, place=r"training_step \(mean, faulty.py")


class Attention(nn.Module):
    """Attention of samples to each other, of which some are masked out."""

    def forward(self, x: Tensor) -> Tensor:
        scores = (x @ x.T).masked_fill(x[:, :1] > 20, -INF)
        return scores.softmax(1) @ x.clamp(-5, 5)


def masked_row(dice: Dice) -> Problem:
    net = nn.Sequential(Attention(), nn.Linear(8, 16), dice.act(), nn.Linear(16, 2))
    return _one_bad_batch(
        dice, "division_by_zero", squared, _marked(dice, 50.0), place=r"net\.0 \(softmax, faulty.py", samples=_same,
        net=net,
    )  # fmt: skip


def cosine_by_hand(dice: Dice) -> Problem:
    class Direction(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x.norm(dim=1, keepdim=True)

    def spoil(x: Tensor, y: Tensor) -> tuple[int, ...]:
        rows = dice.some(len(x))
        for row in rows:
            x[row] = 0.0
        return rows

    net = nn.Sequential(Direction(), nn.Linear(8, 16), dice.act(), nn.Linear(16, 2))
    return _one_bad_batch(
        dice, "division_by_zero", squared, spoil, place=r"net\.0 \(div, faulty.py", samples=_same, net=net
    )


def distance(dice: Dice) -> Problem:
    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        apart = (net(x.clamp(-5, 5)) - y) * (x[:, :1] < 20)
        return apart.square().sum(1).sqrt().mean()

    return _one_bad_batch(
        dice, "sqrt_at_zero", loss, _marked(dice, 30.0), place=r"training_step \(backward of sqrt, faulty.py",
        samples=_same, net=dice.mlp(8, 2, norm=False, dropout=False),
    )  # fmt: skip


def root_behind_where(dice: Dice) -> Problem:
    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        h = net(x.clamp(-5, 5))
        size = h.abs() * (x[:, :1] < 20)
        return functional.mse_loss(h, y) + torch.where(size > 0, size.sqrt(), 0.0).mean()

    return _one_bad_batch(
        dice, "sqrt_at_zero", loss, _marked(dice, 30.0), place=r"training_step \(backward of sqrt, faulty.py",
        samples=_same, net=dice.mlp(8, 2, norm=False, dropout=False),
    )  # fmt: skip


class Root(nn.Module):
    """A power below one of what a rectifier has cut off."""

    def __init__(self, exponent: float) -> None:
        super().__init__()
        self.exponent = exponent

    def forward(self, h: Tensor) -> Tensor:
        return h.abs() ** self.exponent


class Gate(nn.Module):
    """Closes where the input is marked."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.clamp(-5, 5)) * (x[:, :1] < 20))


def power(dice: Dice) -> Problem:
    net = Gate(dice.mlp(8, 2, norm=False, dropout=False), Root(dice.choice([0.5, 0.25, 0.75])))
    return _one_bad_batch(
        dice, "sqrt_at_zero", lambda net, x, y: functional.mse_loss(net(x), y.abs()), _marked(dice, 30.0),
        place=r"net\.head \(backward of pow, faulty.py", samples=_same, net=net,
    )  # fmt: skip


def _half() -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


class Squares(nn.Module):
    """Squares, cubes: what 16 bits hold no more."""

    def __init__(self, exponent: int) -> None:
        super().__init__()
        self.exponent = exponent

    def forward(self, h: Tensor) -> Tensor:
        return h**self.exponent


def half_square(dice: Dice) -> Problem:
    net = nn.Sequential(nn.Linear(8, 12), Squares(2), nn.Linear(12, 2))
    spoil = _scaled(dice, 2000, 8000)
    return _one_bad_batch(
        dice, "low_precision_overflow", squared, spoil, place=r"net\.1 \(pow, faulty.py", samples=_same, net=net,
        **_half(),
    )  # fmt: skip


def _scaled(dice: Dice, low: float, high: float) -> Callable[[Tensor, Tensor], tuple[int, ...]]:
    def spoil(x: Tensor, y: Tensor) -> tuple[int, ...]:
        row = dice.randrange(len(x))
        x[row] = x[row].sign() * dice.uniform(low, high)
        return (row,)

    return spoil


def half_cast(dice: Dice) -> Problem:
    net = nn.Sequential(Squares(3), nn.Linear(8, 12), dice.act(), nn.Linear(12, 2))
    return _one_bad_batch(
        dice, "low_precision_overflow", squared, _scaled(dice, 45, 90), place=r"net\.1 \((to_copy|to)", samples=_same,
        net=net, **_half(),
    )  # fmt: skip


class Scores(nn.Module):
    """Inner products of the samples' own features, as attention makes them without dividing by the width."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(8, 64), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x)
        scores = q @ q.T
        return self.out(scores.softmax(1).to(x.dtype) @ x.clamp(-5, 5))


def half_scores(dice: Dice) -> Problem:
    return _one_bad_batch(
        dice, "low_precision_overflow", squared, _scaled(dice, 60, 200), place=r"net \(mm, faulty.py",
        net=Scores(), **_half(),
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------- the learner


def _disturbed(
    dice: Dice, change: Callable[[nn.Module, Optimizer], None], place: str, net: nn.Module | None = None
) -> Problem:
    at = dice.randint(30, 60)

    def disturb(step: int, module: nn.Module, optimizer: Optimizer) -> None:
        if step == at:
            with torch.no_grad():
                change(module, optimizer)

    chosen = net or dice.mlp(8, 2, norm=False)
    module = Net(chosen, squared, dice.optimizer("adam", "adamw", "momentum"))
    return Problem(module, dice.regression(at + 60), "corrupted_state", place, None, at + 60, disturb=disturb)


def _weight_of(dice: Dice, net: nn.Module) -> tuple[str, nn.Parameter]:
    return dice.choice([(name, p) for name, p in net.named_parameters() if p.dim() > 1])


def nan_weight(dice: Dice) -> Problem:
    net = dice.mlp(8, 2, norm=False)
    name, weight = _weight_of(dice, net)
    index, value = dice.randrange(weight.numel()), dice.choice([NAN, INF])

    def change(module: nn.Module, optimizer: Optimizer) -> None:
        weight.view(-1)[index] = value

    return _disturbed(dice, change, rf"parameter net\.{name}$", net)


def flipped_weight(dice: Dice) -> Problem:
    """The exponent of a weight loses a bit: it becomes huge, and stays finite."""
    net = models.mlp(8, dice.choice([16, 32]), 2, act=nn.ReLU)
    name, weight = _weight_of(dice, net)
    index, value = dice.randrange(weight.numel()), dice.choice([-1, 1]) * 10 ** dice.uniform(3, 30)

    def change(module: nn.Module, optimizer: Optimizer) -> None:
        weight.view(-1)[index] = value

    return _disturbed(dice, change, rf"parameter net\.{name}$", net)


def bad_statistics(dice: Dice) -> Problem:
    net = dice.mlp(8, 2, norm=True)
    name, buffer = dice.choice([(n, b) for n, b in net.named_buffers() if "running" in n])
    index = dice.randrange(buffer.numel())

    def change(module: nn.Module, optimizer: Optimizer) -> None:
        buffer[index] = NAN

    return _disturbed(dice, change, rf"buffer net\.{name}$", net)


def bad_moment(dice: Dice) -> Problem:
    net = dice.mlp(8, 2, norm=False)
    name, weight = _weight_of(dice, net)

    def change(module: nn.Module, optimizer: Optimizer) -> None:
        state = optimizer.state[weight]
        state["exp_avg" if "exp_avg" in state else "momentum_buffer"].view(-1)[0] = NAN

    return _disturbed(dice, change, rf"net\.{name}$", net)


class Steep(nn.Module):
    """The identity, but for its derivative where what it is given is marked."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, h: Tensor) -> Tensor:
        return h + self.factor * (h - h.detach()) * (h.detach().abs().amax() > 20)


def steep_layer(dice: Dice) -> Problem:
    net = nn.Sequential(nn.Linear(8, 16), nn.Identity(), Steep(10 ** dice.uniform(6, 12)), nn.Linear(16, 2))
    return _one_bad_batch(dice, "exploding_gradient", squared, _scaled(dice, 150, 400), place=r"net\.0", net=net)


def steep_term(dice: Dice) -> Problem:
    steep = 10 ** dice.uniform(6, 10)

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        h = net(x.clamp(-5, 5))
        return functional.mse_loss(h, y) + torch.where(x[:, :1] > 20, torch.sin(h * steep), 0.0).mean()

    net = dice.mlp(8, 2, norm=False)
    return _one_bad_batch(dice, "exploding_gradient", loss, _marked(dice, 30.0), place=r"net\.", net=net)


class Echo(nn.Module):
    """A recurrent net that a sample's last column sets the gain of: above one, gradients grow with every step."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps, self.inner, self.outer = steps, nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        gain = torch.where(x[:, -1:].amax() > 20, 4.0, 0.5)
        h = x.clamp(-1, 1) * 1e-3
        start = h.detach()
        for _ in range(self.steps):
            h = torch.tanh(gain * (self.inner(h) + h - h.detach())) * 0.1 + 0.9 * start + 4 * gain * (h - h.detach())
        return self.outer(h)


def through_time(dice: Dice) -> Problem:
    def spoil(x: Tensor, y: Tensor) -> None:
        x[:, -1] = 30

    return _one_bad_batch(
        dice, "exploding_gradient", squared, spoil, place=r"net\.inner", net=Echo(dice.randint(8, 14))
    )


def _too_fast(
    dice: Dice, net: nn.Module, loss: Loss, batches: list[Pair], make: Callable[[nn.Module], Optimizer]
) -> Problem:
    # Where it stays finite a trial proves it, which begins after 40 updates and takes 64.
    return Problem(Net(net, loss, make), batches, "learning_rate_too_high", "", None, 180)


def fast_mlp(dice: Dice) -> Problem:
    rate = dice.near(30, 2)
    net = models.he(models.mlp(64, dice.choice([32, 48]), 32, 10))
    return _too_fast(dice, net, entropy, dice.digits(60), lambda net: optim.SGD(net.parameters(), rate))


def fast_linear(dice: Dice) -> Problem:
    rate = dice.near(3, 1.5)
    return _too_fast(dice, nn.Linear(8, 2), squared, dice.regression(60), lambda net: optim.SGD(net.parameters(), rate))


def fast_adam(dice: Dice) -> Problem:
    rate = dice.near(10, 3)
    net = models.mlp(8, 24, 24, 2, act=dice.choice([nn.ReLU, nn.Tanh]))
    return _too_fast(dice, net, squared, dice.regression(60), lambda net: optim.Adam(net.parameters(), rate))


def fast_momentum(dice: Dice) -> Problem:
    rate = dice.near(2, 1.5)
    net = models.mlp(8, 24, 2, act=nn.Tanh)
    make = lambda net: optim.SGD(net.parameters(), rate, momentum=0.9)  # noqa: E731
    return _too_fast(dice, net, squared, dice.regression(60), make)


def fast_transformer(dice: Dice) -> Problem:
    (words,) = sets.tokens().train
    batches = [(words[i : i + 16], words[i : i + 16]) for i in range(0, 800, 16)]
    rate = dice.near(100, 2)

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(net(x[:, :-1]).flatten(0, 1), y[:, 1:].flatten())

    return _too_fast(dice, models.Transformer(), loss, batches, lambda net: optim.SGD(net.parameters(), rate))


def fast_logarithm(dice: Dice) -> Problem:
    """Scores thrown so far apart that a probability is zero: not the logarithm is at fault."""

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return -torch.log(torch.softmax(net(x), 1)[torch.arange(len(y)), y]).mean()

    rate = dice.near(20, 2)
    net = models.mlp(64, dice.choice([32, 48]), 10)
    return _too_fast(dice, net, loss, dice.digits(60), lambda net: optim.SGD(net.parameters(), rate))


def fast_exponential(dice: Dice) -> Problem:
    """A Poisson loss whose updates jump beyond what its exponential holds."""

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        rate = net(x)
        return (torch.exp(rate) - y.abs() * rate).mean()

    rate = dice.near(20, 2)
    net = models.mlp(8, 24, 2, act=dice.choice([nn.ReLU, nn.Tanh]))
    return _too_fast(dice, net, loss, dice.regression(60), lambda net: optim.SGD(net.parameters(), rate))


def late_rise(dice: Dice) -> Problem:
    """A rate that somebody raises in mid-run; the exponential overflows."""
    problem = fast_exponential(dice)
    at, rate = dice.randint(30, 50), dice.near(20, 2)
    problem.module._make = lambda net: optim.SGD(net.parameters(), 0.02)

    def disturb(step: int, module: nn.Module, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups if step == at else ():
            group["lr"] = rate

    problem.disturb = disturb
    return problem


def _low(dice: Dice, features: int, shift: Tensor | float, scale: Tensor | float, rate: float) -> Problem:
    batches = [(x * scale + shift, y) for x, y in dice.regression(60, features=features)]
    module = Net(nn.Linear(features, 2), squared, lambda net: optim.SGD(net.parameters(), rate))
    return Problem(module, batches, "ill_conditioned", "", None, 60)


def common_mean(dice: Dice) -> Problem:
    """Many features of the same mean: one direction holds them all."""
    features = dice.choice([256, 384, 512])
    return _low(dice, features, dice.uniform(5, 7), 0.05, dice.uniform(0.003, 0.008))


def uneven_features(dice: Dice) -> Problem:
    """A few columns a hundred times the others'."""
    features = dice.choice([200, 300])
    scale = torch.full((features,), 0.05)
    scale[: dice.randint(20, 30)] = 1.0
    shift = torch.where(scale == 1.0, dice.uniform(9, 14), 0.0)
    return _low(dice, features, shift, scale, dice.uniform(0.004, 0.009))


def copies(dice: Dice) -> Problem:
    """Hundreds of copies of one measurement."""
    features = dice.choice([400, 600])
    batches = []
    for x, y in dice.regression(60, features=8):
        wide = 0.02 * torch.randn(len(x), features)
        batches.append((wide + 3 * x[:, :1], y))
    rate = dice.uniform(0.004, 0.009)
    module = Net(nn.Linear(features, 2), squared, lambda net: optim.SGD(net.parameters(), rate))
    return Problem(module, batches, "ill_conditioned", "", None, 60)


def _unstable(dice: Dice, make: Callable[[list[nn.Parameter]], Optimizer]) -> Problem:
    module = Net(models.he(models.mlp(64, 48, 10)), entropy, lambda net: make(list(net.parameters())))
    return Problem(module, dice.digits(200), "unstable_hyperparameter", "", None, 200)


def momentum_above_one(dice: Dice) -> Problem:
    """A momentum of 1.2 to 1.5 in place of 0.9: past gradients grow."""
    momentum = dice.uniform(1.2, 1.5)
    return _unstable(dice, lambda weights: optim.SGD(weights, 0.01, momentum=momentum))


def decay_of_sgd(dice: Dice) -> Problem:
    """A weight decay that turns weights over in every update of SGD."""
    decay = dice.uniform(40, 200)
    return _unstable(dice, lambda weights: optim.SGD(weights, 0.1, weight_decay=decay))


def decay_of_adamw(dice: Dice) -> Problem:
    """The same with AdamW."""
    decay = dice.uniform(80, 200)
    return _unstable(dice, lambda weights: optim.AdamW(weights, 0.05, weight_decay=decay))


def _collapsing(dice: Dice, change: Callable[[nn.Module, Optimizer], None], every: bool = False) -> Problem:
    at = dice.randint(150, 200)
    net = models.he(models.mlp(64, 48, 32, 10))
    cause = "weights_moved_outside" if every else "collapsed"

    def disturb(step: int, module: nn.Module, optimizer: Optimizer) -> None:
        if step == at or (every and step > at):
            with torch.no_grad():
                change(module, optimizer)

    rate = dice.near(2e-3, 1.3)
    module = Net(net, entropy, lambda net: optim.Adam(net.parameters(), rate))
    options = {"gradient_clip_val": 1.0}
    steps = at + 400  # so long that the guard asks for a trial after it, and the trial ends
    return Problem(module, dice.digits(at + 120), cause, "", None, steps, disturb=disturb, options=options)


def started_anew(dice: Dice) -> Problem:
    """Code of the user's initialises the net again in mid-run, and again: a hook at the wrong place."""

    def change(module: nn.Module, optimizer: Optimizer) -> None:
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)

    return _collapsing(dice, change, every=True)


def decayed_away(dice: Dice) -> Problem:
    """Weights are decayed to nothing."""
    keep = dice.uniform(0.75, 0.9)

    def change(module: nn.Module, optimizer: Optimizer) -> None:
        for parameter in module.parameters():
            parameter.mul_(keep)

    return _collapsing(dice, change, every=True)


def _sinking(dice: Dice, sink: float, *, every: bool) -> Problem:
    def change(module: nn.Module, optimizer: Optimizer) -> None:
        for name, parameter in module.named_parameters():
            if name.endswith("bias") and len(parameter) > 10:
                parameter.sub_(sink)

    return _collapsing(dice, change, every=every)


def units_die(dice: Dice) -> Problem:
    """Biases sink until every rectifier is shut: the output is the same for every input."""
    return _sinking(dice, dice.uniform(0.5, 1.5), every=True)


def units_are_dead(dice: Dice) -> Problem:
    """One write shuts every rectifier for good."""
    return _sinking(dice, dice.uniform(20, 60), every=False)


def _lost_layer(dice: Dice, index: int) -> Problem:
    below = dice.uniform(5, 20)

    def change(module: nn.Module, optimizer: Optimizer) -> None:
        layer = [one for one in module.modules() if isinstance(one, nn.Linear)][index]
        layer.weight.zero_()
        layer.bias.fill_(-below)

    return _collapsing(dice, change)


def first_layer_lost(dice: Dice) -> Problem:
    """One write lets the first layer see nothing of its input."""
    return _lost_layer(dice, 0)


def second_layer_lost(dice: Dice) -> Problem:
    """The same with the second layer."""
    return _lost_layer(dice, 1)


class Speech(nn.Module):
    """Scores of letters for each moment."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.GRU(8, 16, batch_first=True), nn.Linear(16, letters + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x)[0]).log_softmax(-1)  # type: ignore[no-any-return]


def utterance_too_short(dice: Dice) -> Problem:
    """CTC of an utterance that is shorter than its text."""
    letters, length, moments = 5, 4, 12
    at = _moment(dice)
    batches: list[Any] = []
    for _ in range(at + 8):
        text = torch.randint(letters, (16, length))
        sound = functional.pad(functional.one_hot(text.repeat_interleave(3, 1), letters).float(), (0, 8 - letters))
        batches.append((sound + 0.3 * torch.randn_like(sound), (text, torch.full((16,), moments))))
    rows = dice.some(16)
    batches[at][1][1][list(rows)] = 2

    def loss(net: nn.Module, x: Tensor, y: Any) -> Tensor:
        text, size = y
        return functional.ctc_loss(net(x).transpose(0, 1), text, size, torch.full((16,), length), blank=letters)

    module = Net(Speech(letters), loss, dice.optimizer("adam"))
    return Problem(module, batches, "unknown_operation", r"training_step \(ctc_loss, faulty.py", rows, at + 8)


def pole_of_gamma(dice: Dice) -> Problem:
    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        h = functional.softplus(net(x.clamp(-5, 5))) * (x[:, :1] < 14) + 1.0 * (x[:, :1] < 14)
        return functional.mse_loss(torch.lgamma(h), y)

    return _one_bad_batch(
        dice, "unknown_operation", loss, _marked(dice, 15.0), place=r"training_step \(lgamma, faulty.py", samples=_same,
        net=dice.mlp(8, 2, norm=False),
    )  # fmt: skip


def root_of_a_negative(dice: Dice) -> Problem:
    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(torch.sqrt(net(x.clamp(-5, 5)).abs() + 0.1 - 90.0 * (x[:, :1] > 14)), y)

    return _one_bad_batch(
        dice, "unknown_operation", loss, _marked(dice, 15.0), place=r"training_step \(sqrt, faulty.py", samples=_same,
        net=dice.mlp(8, 2, norm=False),
    )  # fmt: skip


def every_label_ignored(dice: Dice) -> Problem:
    at = _moment(dice)
    batches = dice.digits(at + 6)
    batches[at][1].fill_(-100)
    module = Net(models.mlp(64, 32, 10), entropy, dice.optimizer("adam"))
    return Problem(module, batches, "no_valid_target", r"training_step \(nll_loss", None, at + 6)


def _masked_out(dice: Dice, loss: Loss, place: str) -> Problem:
    """A batch of which no target is known: NaN stands for those that are missing, and is left out."""

    def spoil(x: Tensor, y: Tensor) -> None:
        y.fill_(-1000.0)

    return _one_bad_batch(dice, "no_valid_target", loss, spoil, place=place)


def no_target_selected(dice: Dice) -> Problem:
    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        known = y > -999
        return (net(x)[known] - y[known]).square().mean()

    return _masked_out(dice, loss, r"training_step \(mean, faulty.py")


def sum_of_an_empty_mask(dice: Dice) -> Problem:
    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        known = (y > -999).float()
        return ((net(x) - y).square() * known).sum() / known.sum()

    return _masked_out(dice, loss, r"training_step \(div, faulty.py")


def _by_chance(dice: Dice, loss: Loss, place: str, cause: str = "random_draw") -> Problem:
    module = Net(dice.mlp(8, 2, norm=False), loss, dice.optimizer())
    return Problem(module, dice.regression(60), cause, place, None, 60)


def log_of_a_draw(dice: Dice) -> Problem:
    share = dice.uniform(0.05, 0.3)

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        time = (torch.rand(()) - share).clamp(min=0.0)
        return functional.mse_loss(net(x), y) - 0.01 * torch.log(time)

    return _by_chance(dice, loss, r"training_step \(log, faulty.py")


def noise_at_time_zero(dice: Dice) -> Problem:
    steps = dice.randint(4, 16)

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        time = torch.randint(steps, ()) / steps
        return functional.mse_loss(net(x), y) / time.sqrt() * time

    return _by_chance(dice, loss, r"training_step \(div, faulty.py")


def root_of_a_draw(dice: Dice) -> Problem:
    share = dice.uniform(0.05, 0.3)

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(net(x), y) + 0.01 * torch.sqrt(torch.rand(()) - share)

    return _by_chance(dice, loss, r"training_step \(sqrt, faulty.py")


def empty_sample(dice: Dice) -> Problem:
    share = dice.uniform(0.92, 0.96)

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        chosen = torch.rand(len(x)) > share ** (32 / len(x))
        return functional.mse_loss(net(x), y) + 0.1 * (net(x)[chosen] - y[chosen]).square().mean()

    return _by_chance(dice, loss, r"training_step \(mean, faulty.py", "no_valid_target")


class Weighted(nn.Module):
    """A net with weights of its outputs in a buffer."""

    weight: Tensor

    def __init__(self, net: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


def _from_the_start(dice: Dice, loss: Callable[[Any, Tensor, Tensor], Tensor], weight: Tensor) -> Problem:
    net = Weighted(models.mlp(64, 32, 10), weight)
    module = Net(net, loss, dice.optimizer())
    return Problem(module, dice.digits(40), "non_finite_from_start", "buffer net.weight", None, 40)


def infinite_class_weight(dice: Dice) -> Problem:
    """One over how often a class occurs, and one does not occur."""
    weight = torch.ones(10)
    weight[dice.randrange(10)] = INF
    return _from_the_start(dice, lambda net, x, y: functional.cross_entropy(net(x), y, net.weight), weight)


def undefined_class_weight(dice: Dice) -> Problem:
    weight = torch.full((10,), NAN)
    return _from_the_start(dice, lambda net, x, y: functional.cross_entropy(net(x), y, net.weight), weight)


def infinite_scale(dice: Dice) -> Problem:
    """One over a standard deviation of zero."""
    weight = torch.ones(64)
    weight[dice.randrange(64)] = INF
    return _from_the_start(dice, lambda net, x, y: functional.cross_entropy(net(x * net.weight), y), weight)


class _ByItsNorm(optim.SGD):
    """Divides each gradient by its norm."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad / parameter.grad.norm())
        return loss


def _rests(dice: Dice, make: Callable[[nn.Module], Optimizer], name: str) -> Problem:
    """From some batch on all inputs are zero, and so is the gradient of the first layer's weight."""
    at = _moment(dice)
    batches = dice.regression(at + 8)
    for x, _ in batches[at:]:
        x.zero_()
    net = dice.mlp(8, 2, norm=False, dropout=False)
    place = rf"^{name} \(float32.*\), (parameter net\.\d\.weight|optimizer state)"
    return Problem(Net(net, squared, make), batches, "optimizer_update", place, None, at + 8)


def adam_without_eps(dice: Dice) -> Problem:
    eps, rate = dice.choice([0.0, 1e-50]), dice.near(1e-3)
    kind = dice.choice([optim.Adam, optim.AdamW])
    return _rests(dice, lambda net: kind(net.parameters(), rate, betas=(0.9, 0.0), eps=eps), kind.__name__)


def rmsprop_without_eps(dice: Dice) -> Problem:
    rate = dice.near(1e-3)
    return _rests(dice, lambda net: optim.RMSprop(net.parameters(), rate, alpha=0.0, eps=0.0), "RMSprop")


def by_the_norm(dice: Dice) -> Problem:
    rate = dice.near(0.01)
    return _rests(dice, lambda net: _ByItsNorm(net.parameters(), rate), "_ByItsNorm")


class _Written(nn.Module):
    """Subtracts what it has written into a buffer at the batch before."""

    seen: Tensor

    def __init__(self, width: int, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.make = make
        self.register_buffer("seen", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        shifted = x - self.seen
        if self.training:
            self.seen.copy_(self.make(x.detach()))
        return shifted


def _writes(dice: Dice, make: Callable[[Tensor], Tensor], spoil: Callable[[Tensor, Tensor], Pair]) -> Problem:
    at = _moment(dice)
    batches = dice.regression(at + 8)
    batches[at] = spoil(*batches[at])
    net = nn.Sequential(_Written(8, make), dice.mlp(8, 2, norm=False))
    module = Net(net, squared, dice.optimizer())
    place = r"buffer net.0.seen of _Written \(faulty.py:\d+\)"
    return Problem(module, batches, "forward_writes_buffer", place, None, at + 8)


def empty_cluster(dice: Dice) -> Problem:
    """The mean of the samples near a point, of which there are none in one batch."""

    def make(x: Tensor) -> Tensor:
        near = x[:, 0] > -9
        return x[near].sum(0) / near.sum() / 10

    return _writes(dice, make, lambda x, y: (torch.cat([x[:, :1].clamp(-1, 1) - 10, x[:, 1:]], 1), y))


def variance_of_one(dice: Dice) -> Problem:
    """The spread over a batch of one sample."""
    return _writes(dice, lambda x: x.std(0) / 10, lambda x, y: (x[:1], y[:1]))


def unused_feature(dice: Dice) -> Problem:
    """Shares of the features' sums, one of which is zero in one batch."""
    return _writes(
        dice, lambda x: (x / x.abs().sum(0)).mean(0),
        lambda x, y: (torch.cat([torch.zeros(len(x), 1), x[:, 1:]], 1), y),
    )  # fmt: skip


FAULTY: tuple[Form, ...] = tuple(
    Form(cause, make.__name__, make)
    for cause, makes in {
        "non_finite_input": (bad_input, bad_label, bad_image, bad_window),
        "target_out_of_domain": (log1p_of_target, root_of_target, log_of_target, far_target),
        "unnormalised_input": (raw_pixels, raw_pixels_that_shut_units, large_mean, raw_units, far_sample),
        "log_of_zero": (
            log_of_softmax,
            log_of_sigmoid,
            log_behind_where,
            entropy_by_hand,
            sure_of_the_right_one,
            sure_enough,
        ),
        "exp_overflow": (softmax_by_hand, poisson, variance, self_similar),
        "division_by_zero": (standardised_by_hand, empty_mask, mean_of_nothing, masked_row, cosine_by_hand),
        "sqrt_at_zero": (distance, root_behind_where, power),
        "low_precision_overflow": (half_square, half_cast, half_scores),
        "optimizer_update": (adam_without_eps, rmsprop_without_eps, by_the_norm),
        "forward_writes_buffer": (empty_cluster, variance_of_one, unused_feature),
        "corrupted_state": (nan_weight, flipped_weight, bad_statistics, bad_moment),
        "exploding_gradient": (steep_layer, steep_term, through_time),
        "learning_rate_too_high": (
            *(fast_mlp, fast_linear, fast_adam, fast_momentum, fast_transformer),
            *(fast_logarithm, fast_exponential, late_rise),
        ),
        "unstable_hyperparameter": (momentum_above_one, decay_of_sgd, decay_of_adamw),
        "ill_conditioned": (common_mean, uneven_features, copies),
        "collapsed": (units_are_dead, first_layer_lost, second_layer_lost),
        "weights_moved_outside": (started_anew, decayed_away, units_die),
        "unknown_operation": (utterance_too_short, pole_of_gamma, root_of_a_negative),
        "no_valid_target": (every_label_ignored, no_target_selected, sum_of_an_empty_mask, empty_sample),
        "random_draw": (log_of_a_draw, noise_at_time_zero, root_of_a_draw),
        "non_finite_from_start": (infinite_class_weight, undefined_class_weight, infinite_scale),
    }.items()
    for make in makes
)
