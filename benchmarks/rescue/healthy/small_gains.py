"""Losses that can only fall by a little: a weak signal, a start that is nearly the end, a large constant on top."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.rescue import data
from benchmarks.rescue.data import Batch, Split
from benchmarks.rescue.models import Loss, Task, Transformer, cross_entropy, mlp, next_token, squared

from .forms import Dice, Recipe, forms, split_rows, usual_rate

Problem = tuple[Split, Callable[[], nn.Module], Loss]


def weak_signal(dice: Dice) -> Problem:
    """The inputs explain 1 to 10 % of the target."""
    g, share = dice.rows(), dice.uniform(0.01, 0.1)
    x = torch.randn(6000, 10, generator=g)
    z = x @ torch.randn(10, generator=g)
    y = share**0.5 * z / z.std() + (1 - share) ** 0.5 * torch.randn(6000, generator=g)
    return split_rows((x, y), 600), lambda: mlp(10, 24, 1), squared


def rare_class(dice: Dice) -> Problem:
    """One row in 20 to 100 is of the other class, and the net begins at that rate."""
    g, share = dice.rows(), dice.log(0.01, 0.05)
    x = torch.randn(6000, 10, generator=g)
    z = x @ torch.randn(10, generator=g) / 10**0.5 + torch.randn(6000, generator=g)
    y = (z > z.quantile(1 - share)).long()

    def net() -> nn.Module:
        made = mlp(10, 24, 2)
        with torch.no_grad():
            made[-1].bias.copy_(torch.tensor([1 - share, share]).log())  # type: ignore[index, operator, union-attr]
        return made

    return split_rows((x, y), 600), net, cross_entropy


def fine_tuning(dice: Dice) -> Problem:
    """A net that begins where another run has ended: digits, learned by ridge regression of random features."""
    clean, width = data.digits(), dice.choice((64, 128))
    first = mlp(64, width, 10)
    for p in first.parameters():
        p.data = torch.randn(p.shape, generator=dice.rows()) / max(1, p.shape[-1]) ** 0.5
    x, y = clean.train
    with torch.no_grad():
        h = torch.relu(first[0](x))  # type: ignore[index, operator]
        aim = 8 * functional.one_hot(y, 10).float() - 2
        top = torch.linalg.solve(h.T @ h + 3 * torch.eye(width), h.T @ aim)
    state = {name: t.clone() for name, t in first.state_dict().items()}
    state["2.weight"], state["2.bias"] = top.T.contiguous(), torch.zeros(10)

    def net() -> nn.Module:
        made = mlp(64, width, 10)
        made.load_state_dict(state)
        return made

    return clean, net, cross_entropy


def constant_on_top(dice: Dice) -> Problem:
    """A loss with a constant that no model takes away, as a likelihood has."""
    constant = dice.log(3, 1000) * dice.choice((1, -1))

    def loss(net: nn.Module, batch: Batch, n: int) -> Tensor:
        return cross_entropy(net, batch, n) + constant

    return data.digits(), lambda: mlp(64, 32, 10), loss


def nearly_uniform(dice: Dice) -> Problem:
    """Sentences whose next word is nearly free."""
    g, sharpness = dice.rows(), dice.uniform(0.3, 0.8)
    chain = torch.softmax(sharpness * torch.randn(12, 12, generator=g), -1)
    words = [torch.randint(12, (2000,), generator=g)]
    for _ in range(12):
        words.append(torch.multinomial(chain[words[-1]], 1, generator=g)[:, 0])
    return split_rows((torch.stack(words, 1),), 200), Transformer, next_token


def wrong_labels(dice: Dice) -> Problem:
    """Digits of which 70 to 95 % have a label drawn at random."""
    clean, g = data.digits(), dice.rows()
    x, y = clean.train
    wrong = torch.rand(len(y), generator=g) < dice.uniform(0.7, 0.95)
    y = torch.where(wrong, torch.randint(10, y.shape, generator=g), y)
    return split_rows((x, y), 200), lambda: mlp(64, 32, 10), cross_entropy


def two_views(dice: Dice) -> Problem:
    """Pairs of views that tell little of each other, under a contrastive loss."""
    g, share = dice.rows(), dice.uniform(0.3, 0.7)
    common = torch.randn(3000, 8, generator=g)
    a, b = (share * common + torch.randn(3000, 8, generator=g) for _ in range(2))

    def loss(net: nn.Module, batch: Batch, n: int) -> Tensor:
        left, right = (functional.normalize(net(x), dim=-1) for x in batch)
        return functional.cross_entropy(left @ right.T / 0.3, torch.arange(len(left)))

    return split_rows((a, b), 64), lambda: mlp(8, 32, 16), loss


PROBLEMS: dict[str, Callable[[Dice], Problem]] = {
    "weak_signal": weak_signal,
    "rare_class": rare_class,
    "fine_tuning": fine_tuning,
    "constant": constant_on_top,
    "nearly_uniform": nearly_uniform,
    "wrong_labels": wrong_labels,
    "two_views": two_views,
}


def draw(dice: Dice, problem: str, optimizer: str) -> Recipe:
    """A problem at a rate at which such nets learn well."""
    split, net, loss = PROBLEMS[problem](dice)
    steps = int(dice.log(150, 300) if problem == "nearly_uniform" else dice.log(200, 500))
    task = Task(lambda: split, net, loss, batch=dice.choice((16, 32, 64)), steps=steps)
    return Recipe(task, usual_rate(dice, optimizer), {"schedule": dice.choice(("constant", "constant", "cosine"))})


FORMS = forms(
    "small_gain", draw,
    """weak_signal/adam weak_signal/sgd rare_class/adam rare_class/momentum fine_tuning/adam fine_tuning/sgd
    constant/adam constant/sgd nearly_uniform/adamw wrong_labels/adam wrong_labels/momentum two_views/adam""", -0.3,
)  # fmt: skip
"""With so little to gain the held-out loss may rise: the net learns rows by heart."""
