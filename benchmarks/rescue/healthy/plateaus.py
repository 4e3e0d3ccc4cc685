"""Long plateaus before anything is learned; many runs end before they leave theirs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.rescue import data
from benchmarks.rescue.data import Split
from benchmarks.rescue.models import Recurrent, Task, cross_entropy, mlp, reconstruction, squared

from .forms import Dice, Recipe, forms, split_rows, usual_rate


def parity(dice: Dice) -> tuple[Split, Callable[[], nn.Module]]:
    """Parity of two to four of 8 to 16 bits."""
    bits, taken = dice.randint(8, 16), dice.randint(2, 4)
    x = torch.randint(2, (4000, bits), generator=dice.rows()).float()
    width = dice.choice((32, 64, 128))
    return split_rows((2 * x - 1, x[:, :taken].sum(1).long() % 2), 400), lambda: mlp(bits, width, 2)


def addition(dice: Dice) -> tuple[Split, Callable[[], nn.Module]]:
    """Sum of two numbers that a second input marks among 8 to 20."""
    length, g = dice.randint(8, 20), dice.rows()
    value = torch.rand(2400, length, generator=g)
    place = torch.rand(2400, length, generator=g).argsort(1)[:, :2]
    mark = torch.zeros(2400, length).scatter_(1, place, 1.0)
    cell, width = dice.choice((nn.GRU, nn.LSTM, nn.RNN)), dice.choice((16, 32))
    split = split_rows((torch.stack([value, mark], -1), (value * mark).sum(1)), 300)
    return split, lambda: Recurrent(cell, 2, width, 1)


def product(dice: Dice) -> tuple[Split, Callable[[], nn.Module]]:
    """Product of two or three of the inputs."""
    inputs, taken = dice.randint(8, 16), dice.randint(2, 3)
    x = torch.randn(4000, inputs, generator=dice.rows())
    return split_rows((x, x[:, :taken].prod(1)), 400), lambda: mlp(inputs, 64, 64, 1)


def modular(dice: Dice) -> tuple[Split, Callable[[], nn.Module]]:
    """Sum of two numbers modulo a third; all pairs are shown, and the loss is that of what was shown."""
    modulus = dice.choice((11, 13, 17))
    a, b = (t.flatten() for t in torch.meshgrid(torch.arange(modulus), torch.arange(modulus), indexing="ij"))
    order = torch.randperm(len(a), generator=dice.rows())
    pairs = torch.stack([a, b + modulus], 1)[order], ((a + b) % modulus)[order]

    def net() -> nn.Module:
        return nn.Sequential(nn.Embedding(2 * modulus, 24), nn.Flatten(), mlp(48, 64, modulus))

    return Split(pairs, pairs), net


def deep_sigmoid(dice: Dice) -> tuple[Split, Callable[[], nn.Module]]:
    """Digits through three to five layers of sigmoids, which hide the gradient from the first."""
    depth = dice.randint(3, 5)
    return data.digits(), lambda: mlp(64, *[32] * depth, 10, act=nn.Sigmoid)


class _Small(nn.Sequential):
    """Linear layers whose weights begin near the saddle at zero."""

    def __init__(self, *sizes: int, share: float) -> None:
        super().__init__(*mlp(*sizes, act=nn.Identity))
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(share)


def saddle(dice: Dice) -> tuple[Split, Callable[[], nn.Module]]:
    """A linear autoencoder that begins near a saddle."""
    share, width = dice.log(0.01, 0.2), dice.choice((8, 16))
    return data.digits(), lambda: _Small(64, width, 64, share=share)


def late_input(dice: Dice) -> tuple[Split, Callable[[], nn.Module]]:
    """The first of many inputs decides, and a recurrent net sees it first."""
    length = dice.randint(8, 16)
    x = torch.randn(2400, length, 1, generator=dice.rows())
    return split_rows((x, 2 * x[:, 0, 0]), 300), lambda: Recurrent(nn.GRU, 1, 24, 1)


PROBLEMS: dict[str, Callable[[Dice], tuple[Split, Callable[[], nn.Module]]]] = {
    "parity": parity,
    "addition": addition,
    "product": product,
    "modular": modular,
    "deep_sigmoid": deep_sigmoid,
    "saddle": saddle,
    "late_input": late_input,
}
LOSSES: dict[str, Callable[..., Tensor]] = {
    "parity": cross_entropy,
    "modular": cross_entropy,
    "deep_sigmoid": cross_entropy,
    "saddle": reconstruction,
}


def draw(dice: Dice, problem: str, optimizer: str) -> Recipe:
    """A problem at a rate at which such nets learn well, or up to three times as much."""
    split, net = PROBLEMS[problem](dice)
    recurrent = problem in ("addition", "late_input")
    steps = int(dice.log(150, 300) if recurrent else dice.log(200, 600))
    batch = min(dice.choice((16, 32, 64)), len(split.train[0]))
    task = Task(lambda: split, net, LOSSES.get(problem, squared), batch=batch, steps=steps)
    clip_val = dice.choice((None, 1.0)) if recurrent else None
    rate = usual_rate(dice, optimizer, dice.choice((1.0, 1.0, 3.0)))
    return Recipe(task, rate, {"clip_val": clip_val, "schedule": dice.choice(("constant", "constant", "warmup"))})


FORMS = forms(
    "plateau", draw,
    """parity/adam parity/adamw parity/sgd parity/momentum addition/adam addition/rmsprop addition/momentum
    product/adam product/sgd modular/adamw modular/adam deep_sigmoid/adam deep_sigmoid/sgd deep_sigmoid/momentum
    saddle/sgd saddle/adam late_input/adam late_input/adamw""", -0.2,
)  # fmt: skip
"""The held-out loss may rise a little: what is learned by heart before the plateau ends is not learned."""
