"""Runs that stay finite and do not learn, or would not: advice names their cause."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.nn import functional
from torch.optim import Optimizer

from benchmarks.rescue import models

from .faulty import entropy, squared
from .problems import Dice, Form, Loss, Net, Pair, Problem

STEPS = 120
"""Updates of a run; a loss that has not moved for all but 24 of them is examined."""


def _stuck(
    dice: Dice,
    cause: str,
    net: nn.Module,
    loss: Loss,
    batches: list[Pair],
    make: Any,
    place: str = "",
    *,
    steps: int = STEPS,
    **options: Any,
) -> Problem:
    return Problem(Net(net, loss, make), batches, cause, place, None, steps, "examine", options=options)


def _sgd(rate: float, momentum: float = 0.0) -> Any:
    return lambda net: optim.SGD(net.parameters(), rate, momentum=momentum)


def _adam(rate: float) -> Any:
    return lambda net: optim.Adam(net.parameters(), rate)


# ------------------------------------------------------------------------------------------------- layer by layer


def _deep(dice: Dice, act: type[nn.Module], depth: int, scale: float | None) -> nn.Sequential:
    width = dice.choice([24, 32, 48])
    net = models.mlp(64, *[width] * depth, 10, act=act)
    if scale is not None:
        for p in net.parameters():
            nn.init.normal_(p, std=scale / width**0.5) if p.dim() > 1 else nn.init.zeros_(p)
    return net  # type: ignore[return-value]


def deep_sigmoids(dice: Dice) -> Problem:
    net = _deep(dice, nn.Sigmoid, dice.randint(8, 14), None)
    return _stuck(dice, "vanishing_gradient", net, entropy, dice.digits(60), _sgd(dice.near(0.05)), r"^net\.0")


def small_tanh(dice: Dice) -> Problem:
    net = _deep(dice, nn.Tanh, dice.randint(9, 12), dice.uniform(0.05, 0.2))
    return _stuck(dice, "vanishing_gradient", net, entropy, dice.digits(60), _sgd(dice.near(0.05)), r"^net\.0")


def small_elu(dice: Dice) -> Problem:
    net = _deep(dice, nn.ELU, dice.randint(9, 12), dice.uniform(0.05, 0.2))
    return _stuck(dice, "vanishing_gradient", net, entropy, dice.digits(60), _sgd(dice.near(0.05)), r"^net\.0")


def large_sigmoids(dice: Dice) -> Problem:
    """Weights so large that every unit sits at an end."""
    net = models.mlp(64, 32, 32, 10, act=dice.choice([nn.Sigmoid, nn.Tanh]))
    with torch.no_grad():
        for layer in (net[0], net[2]):  # type: ignore[index]
            layer.weight.normal_(std=dice.uniform(8, 20))
    where = r"^net\.[13] "
    return _before(_stuck(dice, "saturated_activation", net, entropy, dice.digits(60), _sgd(dice.near(1e-3)), where))


def biased_sigmoids(dice: Dice) -> Problem:
    """Biases far from zero."""
    net = models.mlp(64, 32, 10, act=dice.choice([nn.Sigmoid, nn.Tanh]))
    with torch.no_grad():
        net[0].bias.fill_(dice.choice([-1, 1]) * dice.uniform(15, 30))  # type: ignore[index]
    return _stuck(dice, "saturated_activation", net, entropy, dice.digits(60), _sgd(dice.near(0.003)), r"^net\.1 ")


class Gated(nn.Module):
    """A gate of the user's own, as a function and not as a module."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.gate, self.value, self.out = nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(32, 10)
        nn.init.normal_(self.gate.weight, std=scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.sigmoid(self.gate(x) - 60) * self.value(x))


def shut_gate(dice: Dice) -> Problem:
    net = Gated(dice.uniform(0.5, 2))
    return _stuck(dice, "saturated_activation", net, entropy, dice.digits(60), _sgd(dice.near(0.01)), r"sigmoid")


def _dead(dice: Dice, depth: int) -> Problem:
    net = models.mlp(64, *[32] * depth, 10)
    which = 2 * dice.randrange(depth)
    with torch.no_grad():
        net[which].bias.fill_(-dice.uniform(15, 30))  # type: ignore[index]
    return _stuck(dice, "dead_relu", net, entropy, dice.digits(60), _sgd(dice.near(0.02)), rf"^net\.{which + 1} ")


def dead_shallow(dice: Dice) -> Problem:
    return _dead(dice, 1)


def dead_deep(dice: Dice) -> Problem:
    return _dead(dice, 3)


def dead_features(dice: Dice) -> Problem:
    """A convolution whose channels are all shut."""
    net = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(432, 10))
    with torch.no_grad():
        net[1].bias.fill_(-dice.uniform(10, 20))  # type: ignore[operator]
    return _stuck(dice, "dead_relu", net, entropy, dice.digits(60), _sgd(dice.near(0.02)), r"^net\.2 ")


# ------------------------------------------------------------------------------------------------------- the loss


def _one_hot(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.mse_loss(net(x), functional.one_hot(y, 10).float())


def _before(problem: Problem) -> Problem:
    problem.look, problem.steps = "preflight", 5
    return problem


def squared_on_sigmoids(dice: Dice) -> Problem:
    """Deep enough that the loss settles where every class is given a tenth."""
    net = nn.Sequential(*models.mlp(64, 32, 32, 10, act=nn.Sigmoid), nn.Sigmoid())
    return _stuck(
        dice,
        "mse_for_classification",
        net,
        _one_hot,
        dice.digits(60),
        _sgd(dice.near(1.0)),
        r"\(mse_loss",
        steps=400,
    )


def squared_on_softmax(dice: Dice) -> Problem:
    net = nn.Sequential(*dice.mlp(64, 10), nn.Softmax(1))
    problem = _stuck(
        dice, "mse_for_classification", net, _one_hot, dice.digits(60), _adam(1e-3), r"training_step \(mse"
    )
    return _before(problem)


def squared_by_hand(dice: Dice) -> Problem:
    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (net(x) - functional.one_hot(y, 10).float()).square().mean()

    net = nn.Sequential(*dice.mlp(64, 10), nn.Sigmoid())
    return _before(
        _stuck(dice, "mse_for_classification", net, loss, dice.digits(60), _adam(1e-3), r"training_step \(squared")
    )


def softmax_at_the_end(dice: Dice) -> Problem:
    net = nn.Sequential(*dice.mlp(64, 10), nn.Softmax(1))
    where = rf"^net\.{len(net) - 1}"
    return _before(_stuck(dice, "double_softmax", net, entropy, dice.digits(60), _adam(1e-3), where))


def softmax_in_the_step(dice: Dice) -> Problem:
    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        p = functional.softmax(net(x), dim=1)
        return functional.cross_entropy(p, y)

    net = dice.mlp(64, 10)
    return _stuck(dice, "double_softmax", net, loss, dice.digits(60), _sgd(dice.near(0.01)), r"slow.py:\d+")


def sigmoid_twice(dice: Dice) -> Problem:
    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(net(x)[:, 0], (y > 4).float())

    net = nn.Sequential(*dice.mlp(64, 1), nn.Sigmoid())
    where = rf"^net\.{len(net) - 1}"
    return _before(_stuck(dice, "double_softmax", net, loss, dice.digits(60), _adam(1e-3), where))


# -------------------------------------------------------------------------------------------------- the untrained


def wide_start(dice: Dice) -> Problem:
    """Standard normal weights."""
    net = models.mlp(64, dice.choice([64, 128, 256]), 64, 10)
    for p in net.parameters():
        nn.init.normal_(p) if p.dim() > 1 else nn.init.zeros_(p)
    return _before(
        _stuck(dice, "unbalanced_initialisation", net, entropy, dice.digits(60), _adam(1e-3), r"^net\.[024]")
    )


def one_layer_far_off(dice: Dice) -> Problem:
    which = dice.choice([0, 2, 4])
    net = models.mlp(64, 48, 48, 10)
    with torch.no_grad():
        net[which].weight.mul_(dice.uniform(60, 200))  # type: ignore[index]
    return _before(
        _stuck(dice, "unbalanced_initialisation", net, entropy, dice.digits(60), _adam(1e-3), rf"^net\.{which}")
    )


def large_embedding(dice: Dice) -> Problem:
    """Token embeddings of the default scale, shared with the output layer without a factor: scores of hundreds."""

    class Tied(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.embed, self.mix = nn.Embedding(16, width), nn.Linear(width, width)
            nn.init.normal_(self.mix.weight, std=dice.uniform(6, 9) / width**0.5)

        def forward(self, x: Tensor) -> Tensor:
            words = ((x[:, :6] + 1) * 8).long().clamp(0, 15)
            return self.mix(self.embed(words).sum(1)) @ self.embed.weight[:10].T

    net = Tied(dice.choice([64, 128]))
    return _before(_stuck(dice, "unbalanced_initialisation", net, entropy, dice.digits(60), _adam(1e-3), r"^net"))


# ------------------------------------------------------------------------------------------------- wrong gradients


class Wrong(nn.Module):
    """An activation of the user's own with a backward pass of the user's own."""

    def __init__(self, function: type[torch.autograd.Function], factor: float) -> None:
        super().__init__()
        self.function, self.factor = function, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x, self.factor)  # type: ignore[no-any-return, no-untyped-call]


class Tanh(torch.autograd.Function):
    """A tanh of which the derivative has the wrong sign in its second term."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        y = torch.tanh(factor * x)
        ctx.save_for_backward(y)
        ctx.factor = factor
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        return grad * ctx.factor * (1 + y * y), None


class Cube(torch.autograd.Function):
    """A power whose exponent is forgotten in the derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.factor = factor
        return factor * x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad * ctx.factor * x**2, None


class Swish(torch.autograd.Function):
    """A product of which the derivative has one of two terms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x * torch.sigmoid(factor * x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad * torch.sigmoid(ctx.factor * x), None


class Standard(nn.Module):
    """A normalisation by hand whose spread is detached."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.detach().std(0, keepdim=True)


def _checked(dice: Dice, act: nn.Module, place: str) -> Problem:
    width = dice.choice([16, 24, 32])
    net = nn.Sequential(nn.Linear(8, width), act, nn.Linear(width, width), dice.act(), nn.Linear(width, 2))
    problem = _stuck(dice, "wrong_gradient", net, squared, dice.regression(4), dice.optimizer(), place)
    problem.look = "check"
    return problem


def wrong_sign(dice: Dice) -> Problem:
    return _checked(dice, Wrong(Tanh, dice.uniform(0.8, 2)), r"^net\.1 \(backward of Tanh, slow.py:\d+\)")


def wrong_factor(dice: Dice) -> Problem:
    return _checked(dice, Wrong(Cube, dice.near(0.5)), r"^net\.1 \(backward of Cube, slow.py:\d+\)")


def missing_term(dice: Dice) -> Problem:
    return _checked(dice, Wrong(Swish, dice.uniform(0.8, 2)), r"^net\.1 \(backward of Swish, slow.py:\d+\)")


def detached_part(dice: Dice) -> Problem:
    return _checked(dice, Standard(), r"^net\.0\.")


# ---------------------------------------------------------------------------------------------------- the course


def _settled(problem: Problem) -> Problem:
    """The problem, run on after its loss has come down a little: that is no loss which does not move."""
    problem.patience, problem.steps = problem.steps - 24, 2 * problem.steps
    return problem


def valley(dice: Dice) -> Problem:
    """A bounded loss at a rate far above what its valley allows: updates jump from side to side."""

    class Bowl(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(12) * 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.w

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        w = net(x)
        return (torch.sqrt(1 + 100 * w.square()) - 1).mean() + 0.01 * (w * x[:, :12].mean(0)).mean()

    net = Bowl()
    rate = 2 * float(net.w.detach().abs().mean()) * 12 / 10  # a step as long as the valley is wide
    return _settled(_stuck(dice, "oscillation", net, loss, dice.regression(60, features=12), _sgd(rate), "loss"))


def two_sides(dice: Dice) -> Problem:
    """A classifier of which the scores are scaled: the rate is twice what its loss allows, and clipping holds it."""
    net = nn.Linear(8, 2)
    batches = [(x, (x[:, 0] > 0).long()) for x, _ in dice.regression(60, size=64)]
    scale = dice.uniform(20, 40)

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (scale * (net(x) - functional.one_hot(y, 2).float())).square().clamp(max=1e9).mean()

    rate = dice.uniform(0.5, 1.0)
    return _settled(
        _stuck(dice, "oscillation", net, loss, batches, _sgd(rate), "loss", gradient_clip_val=dice.uniform(1.0, 2.0))
    )


def across(dice: Dice) -> Problem:
    """Angles that every update throws to the other side of where they should be."""

    class Angles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(1.2 * torch.randn(10).sign() + 0.1 * torch.randn(10))

        def forward(self, x: Tensor) -> Tensor:
            return self.w

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (1 - torch.cos(net(x))).sum() / 10 + 1e-3 * (net(x) * x[:, :10].mean(0)).sum()

    rate = 10 * dice.uniform(2.3, 2.9)
    return _settled(_stuck(dice, "oscillation", Angles(), loss, dice.regression(60, features=10), _sgd(rate), "loss"))


def all_zero(dice: Dice) -> Problem:
    """Every weight zero under tanh: no gradient reaches either layer, and it bends down between them."""
    net = models.mlp(8, dice.choice([16, 32]), 2, act=nn.Tanh, bias=False)
    for p in net.parameters():
        nn.init.zeros_(p)
    return _stuck(dice, "saddle_point", net, squared, dice.regression(60), _sgd(dice.near(0.05)), "loss")


def all_equal(dice: Dice) -> Problem:
    """A product of factors that all begin at zero, as a linear autoencoder does."""

    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(8, 3, bias=False), nn.Linear(3, 8, bias=False)
            nn.init.zeros_(self.down.weight)
            nn.init.zeros_(self.up.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.down(x))

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(net(x), x)

    return _stuck(dice, "saddle_point", Autoencoder(), loss, dice.regression(60), _sgd(dice.near(0.05)), "loss")


def monkey_saddle(dice: Dice) -> Problem:
    """A ridge: the loss falls to both sides of a point where it is flat."""

    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.w

    bends = torch.tensor([1.0] * 5 + [-dice.uniform(0.3, 1.0)])

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        w = net(x)
        return 1 + (bends * w.square()).sum() + w.pow(4).sum() + 1e-4 * (w.square() * x[:, :6].mean(0)).sum()

    return _stuck(dice, "saddle_point", Point(), loss, dice.regression(60), _sgd(dice.near(0.05)), "loss")


def wrong_frequency(dice: Dice) -> Problem:
    """A wave whose frequency is fitted: minima between the right one and the start."""

    class Wave(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.speed = nn.Parameter(torch.tensor(0.0))

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(self.speed * x)

    right = dice.uniform(4.5, 6.0)
    batches = []
    for _ in range(60):
        x = torch.linspace(-3, 3, 64)[:, None] + 0.02 * torch.randn(64, 1)
        batches.append((x, torch.sin(right * x)))
    net = Wave()
    with torch.no_grad():
        net.speed.fill_(_minimum(right))
    return _stuck(dice, "local_minimum", net, squared, batches, _sgd(dice.uniform(0.005, 0.01)), "loss")


def _minimum(right: float) -> float:
    """A minimum of the mean square of sin(v·x) − sin(right·x) on −3…3 away from the right one."""
    x = torch.linspace(-3, 3, 256)
    speeds = torch.linspace(1.0, right - 1.2, 400)
    losses = (torch.sin(speeds[:, None] * x) - torch.sin(right * x)).square().mean(1)
    inner = [i for i in range(1, 399) if losses[i] < losses[i - 1] and losses[i] < losses[i + 1]]
    return float(speeds[inner[-1]]) if inner else 1.0


def double_well(dice: Dice) -> Problem:
    """The shallow one of two wells, in several dimensions."""
    tilt = dice.uniform(0.15, 0.25)

    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.full((8,), 0.85) + 0.05 * torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.w

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        w = net(x)
        return ((w.square() - 1).square() + tilt * w).mean() + 1 + 1e-3 * (w * x[:, :8].mean(0)).mean()

    return _stuck(dice, "local_minimum", Point(), loss, dice.regression(60), _sgd(dice.near(0.05)), "loss")


def one_cluster(dice: Dice) -> Problem:
    """Two centres caught in one cluster while two clusters share the third."""

    class Centres(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.at = nn.Parameter(torch.tensor([[-10.2, 0.0], [-9.8, 0.0], [10.0, 0.0]]) + 0.1 * torch.randn(3, 2))

        def forward(self, x: Tensor) -> Tensor:
            return (x[:, None] - self.at).square().sum(-1).amin(1)

    middle = torch.tensor([[-10.0, 0.0], [10.0, dice.uniform(4, 6)], [10.0, -dice.uniform(4, 6)]])
    batches = []
    for _ in range(60):
        x = middle.repeat(22, 1) + 0.3 * torch.randn(66, 2)
        batches.append((x, x))
    make = _sgd(dice.near(0.2))
    return _stuck(dice, "local_minimum", Centres(), lambda net, x, y: net(x).mean(), batches, make, "loss")


def layer_too_fast(dice: Dice) -> Problem:
    """A rate and a decay for one layer that were meant for another optimizer: what it learned is soon gone."""
    which = dice.choice([0, 3])
    width = dice.choice([24, 32])
    hidden = [(nn.Linear(n, width), nn.LayerNorm(width), nn.GELU()) for n in (64, width)]
    net = nn.Sequential(*hidden[0], *hidden[1], nn.Linear(width, 10))
    rate = dice.uniform(1, 3)

    def make(net: nn.Module) -> Optimizer:
        own = [*net[which].parameters()]  # type: ignore[index]
        rest = [p for p in net.parameters() if all(p is not q for q in own)]
        return optim.AdamW([{"params": rest}, {"params": own, "lr": rate, "weight_decay": 0.5 / rate}], 3e-5)

    problem = _stuck(
        dice, "layer_update_abnormal", net, entropy, dice.digits(60), make, rf"^net\.{which}$", steps=4 * STEPS
    )
    problem.patience = STEPS
    return problem


def loud_body(dice: Dice) -> Problem:
    """SGD, and a first layer whose weights are multiplied by a factor in the forward pass."""

    class Loud(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.norm, self.head = nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 10)
            self.factor = dice.uniform(1000, 3000)
            with torch.no_grad():
                self.body.weight.div_(self.factor)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.norm(functional.linear(x, self.body.weight * self.factor))))

    where = r"^net\.body"
    problem = _stuck(
        dice, "layer_update_abnormal", Loud(), entropy, dice.digits(60), _sgd(dice.uniform(0.001, 0.003)), where
    )
    # The first updates throw it far out, and leave it there: no later one shows that, and a trial does.
    problem.look, problem.steps = "fit", 2 * STEPS
    return problem


def loud_head(dice: Dice) -> Problem:
    """SGD with one layer's gradient scaled up by a factor in the forward pass."""

    class Loud(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(64, 32), nn.Linear(32, 10)
            self.factor = dice.uniform(1000, 3000)
            with torch.no_grad():
                self.head.weight.div_(self.factor)

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(torch.tanh(self.body(x)), self.head.weight * self.factor)

    return _stuck(
        dice, "layer_update_abnormal", Loud(), entropy, dice.digits(60), _sgd(dice.uniform(0.001, 0.003)), r"^net\.head"
    )


def _noisy(dice: Dice, size: int, make: Any, net: nn.Module | None = None) -> Problem:
    """A sample or two at a time, at a rate that suits many: what the noise of the gradient brings keeps the loss up."""
    slope = torch.randn(32, 2) * 0.5 / 32**0.5
    batches = []
    for _ in range(STEPS * 4):
        x = torch.randn(size, 32)
        batches.append((x, x @ slope + torch.randn(size, 2)))
    steps = 4 * STEPS
    return _stuck(dice, "batch_size", net or nn.Linear(32, 2), squared, batches, make, "gradient", steps=steps)


def one_sample(dice: Dice) -> Problem:
    return _noisy(dice, 1, _sgd(dice.uniform(0.02, 0.026)))


def two_samples(dice: Dice) -> Problem:
    return _noisy(dice, 2, _adam(dice.uniform(0.035, 0.05)))


def few_samples(dice: Dice) -> Problem:
    return _noisy(dice, dice.choice([3, 4]), _adam(dice.uniform(0.02, 0.03)), models.mlp(32, 16, 2, act=nn.Tanh))


def _unrelated(dice: Dice, net: nn.Module, reorder: Callable[[Tensor], Tensor]) -> Problem:
    batches = dice.digits(60, 48)
    labels = reorder(torch.cat([y for _, y in batches])).split(48)
    mixed = [(x, y) for (x, _), y in zip(batches, labels, strict=True)]
    where = "the training data"
    return _stuck(dice, "labels_unrelated", net, entropy, mixed, _adam(dice.near(1e-3)), where)


def shuffled_labels(dice: Dice) -> Problem:
    return _unrelated(dice, dice.mlp(64, 10), lambda y: y[torch.randperm(len(y))])


def shifted_labels(dice: Dice) -> Problem:
    """Labels that lag behind their inputs by some rows."""
    return _unrelated(dice, models.cnn(), lambda y: y.roll(dice.randint(1, 100)))


def drawn_labels(dice: Dice) -> Problem:
    return _unrelated(dice, models.Recurrent(nn.GRU, 8, 24, 10), lambda y: torch.randint(10, (len(y),)))


def _beyond_one(dice: Dice, low: float, high: float) -> Problem:
    batches = [(x, torch.where(y > 0, high, low)) for x, y in dice.regression(40)]
    loss = lambda net, x, y: functional.binary_cross_entropy_with_logits(net(x), y)  # noqa: E731
    net = dice.mlp(8, 2, norm=False)
    where = r"training_step \(binary_cross_entropy"
    return _before(_stuck(dice, "unbounded_loss", net, loss, batches, _adam(1e-3), where))


def signs_for_classes(dice: Dice) -> Problem:
    return _beyond_one(dice, -1.0, 1.0)


def classes_from_one(dice: Dice) -> Problem:
    return _beyond_one(dice, 1.0, 2.0)


def masks_in_bytes(dice: Dice) -> Problem:
    return _beyond_one(dice, 0.0, 255.0)


SLOW: tuple[Form, ...] = tuple(
    Form(cause, make.__name__, make)
    for cause, makes in {
        "vanishing_gradient": (deep_sigmoids, small_tanh, small_elu),
        "saturated_activation": (large_sigmoids, biased_sigmoids, shut_gate),
        "dead_relu": (dead_shallow, dead_deep, dead_features),
        "mse_for_classification": (squared_on_sigmoids, squared_on_softmax, squared_by_hand),
        "double_softmax": (softmax_at_the_end, softmax_in_the_step, sigmoid_twice),
        "unbalanced_initialisation": (wide_start, one_layer_far_off, large_embedding),
        "wrong_gradient": (wrong_sign, wrong_factor, missing_term, detached_part),
        "oscillation": (valley, two_sides, across),
        "saddle_point": (all_zero, all_equal, monkey_saddle),
        "local_minimum": (wrong_frequency, double_well, one_cluster),
        "layer_update_abnormal": (layer_too_fast, loud_body, loud_head),
        "unbounded_loss": (signs_for_classes, classes_from_one, masks_in_bytes),
        "labels_unrelated": (shuffled_labels, shifted_labels, drawn_labels),
        "batch_size": (one_sample, two_samples, few_samples),
    }.items()
    for make in makes
)
