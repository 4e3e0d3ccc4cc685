"""Chance in the loss: the same batch has another loss with every draw."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.rescue import data
from benchmarks.rescue.data import Batch, Split
from benchmarks.rescue.models import Loss, Task, cross_entropy, mlp, squared

from .forms import Dice, Recipe, forms, usual_rate
from .units import in_units

Problem = tuple[Split, Callable[[], nn.Module], Loss, Loss]


def _fixed(loss: Loss) -> Loss:
    """The same loss with numbers that are always the same; the streams are left as they were."""

    def held(net: nn.Module, batch: Batch, n: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return loss(net, batch, n)

    return held


def dropout(dice: Dice) -> Problem:
    """Dropout of 0.3 to 0.8."""
    share, sizes = dice.uniform(0.3, 0.8), dice.choice(((64, 64, 10), (64, 64, 64, 10)))
    return data.digits(), lambda: mlp(*sizes, dropout=share), cross_entropy, cross_entropy


def noise_level(dice: Dice) -> Problem:
    """Denoising at a level drawn for each batch, from a hundredth to ten: the loss differs by a factor of thousands."""
    low, high, weighs = -dice.uniform(1, 2), dice.uniform(0, 1), dice.random() < 0.4

    def loss(net: nn.Module, batch: Batch, n: int) -> Tensor:
        x = batch[0]
        level = 10 ** (low + (high - low) * torch.rand(()))
        error = (net(x + level * torch.randn_like(x)) - x).square().mean()
        return error * (1 + 1 / level**2) if weighs else error

    return data.digits(), lambda: mlp(64, 64, 64), loss, _fixed(loss)


def timestep(dice: Dice) -> Problem:
    """The noise of a diffusion, at a time drawn for each row, or for each batch."""
    whole = dice.random() < 0.4

    def loss(net: nn.Module, batch: Batch, n: int) -> Tensor:
        x = batch[0]
        time = torch.rand(1, 1).expand(len(x), 1) if whole else torch.rand(len(x), 1)
        noise, kept = torch.randn_like(x), torch.cos(time * 1.57)
        seen = kept * x + (1 - kept**2).sqrt() * noise
        return functional.mse_loss(net(torch.cat([seen, time], 1)), noise)

    return data.digits(), lambda: mlp(65, 96, 64, act=nn.SiLU), loss, _fixed(loss)


class Variational(nn.Module):
    """Encoder and decoder."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(64, 48, 2 * latent), mlp(latent, 48, 64)


def variational(dice: Dice) -> Problem:
    """A variational autoencoder, its loss summed over the pixels or a mean."""
    latent, beta, unit = dice.choice((2, 8)), dice.log(0.1, 4), dice.choice((1 / 64, 1.0))

    def loss(net: nn.Module, batch: Batch, n: int) -> Tensor:
        x = batch[0]
        mean, log_variance = net.encoder(x).chunk(2, -1)  # type: ignore[operator]
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        error = (net.decoder(code) - x).square().sum(-1)  # type: ignore[operator]
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1) / 2
        return unit * (error + beta * divergence).mean()

    return data.digits(), lambda: Variational(latent), loss, _fixed(loss)


def mixup(dice: Dice) -> Problem:
    """Each batch is mixed with itself by a share that is drawn."""

    def loss(net: nn.Module, batch: Batch, n: int) -> Tensor:
        (x, y), share, other = batch, torch.rand(()), torch.randperm(len(batch[0]))
        out = net(share * x + (1 - share) * x[other])
        return share * functional.cross_entropy(out, y) + (1 - share) * functional.cross_entropy(out, y[other])

    return data.digits(), lambda: mlp(64, 64, 10), loss, cross_entropy


def masked(dice: Dice) -> Problem:
    """Pixels are hidden, a drawn share of them, and have to be told."""

    def loss(net: nn.Module, batch: Batch, n: int) -> Tensor:
        x = batch[0]
        hidden = torch.rand_like(x) < torch.rand(())
        error = (net(torch.where(hidden, 0.0, x)) - x).square()
        return (error * hidden).sum() / (hidden.sum() + 1)

    return data.digits(), lambda: mlp(64, 64, 64), loss, _fixed(loss)


def quantiles(dice: Dice) -> Problem:
    """A drawn quantile of a target in its own unit."""
    unit = dice.log(1, 1000)
    rows = in_units(dice, unit, dice.uniform(0, 3))
    inputs = rows.train[0].shape[1]

    def loss(net: nn.Module, batch: Batch, n: int) -> Tensor:
        level = torch.rand(len(batch[0]), 1)
        error = batch[1] - net(torch.cat([batch[0], level], 1))[:, 0]
        return torch.maximum(level[:, 0] * error, (level[:, 0] - 1) * error).mean()

    return rows, lambda: mlp(inputs + 1, 48, 1), loss, _fixed(loss)


def importance(dice: Dice) -> Problem:
    """A weight for each batch whose distribution has a heavy tail."""
    tail = dice.uniform(0.3, 0.7)

    def loss(net: nn.Module, batch: Batch, n: int) -> Tensor:
        return squared(net, batch, n) * (1 - torch.rand(())).clamp_min(1e-4) ** -tail

    return data.diabetes(), lambda: mlp(10, 24, 1), loss, squared


class Skipping(nn.Module):
    """Residual blocks, each left out by chance."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share, self.head = share, nn.Linear(64, 10)
        self.blocks = nn.ModuleList(mlp(64, 32, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            kept = (torch.rand(()) > self.share) if self.training else 1 - self.share
            x = x + kept * block(x)
        return self.head(x)  # type: ignore[no-any-return]


def depth(dice: Dice) -> Problem:
    """Stochastic depth."""
    share = dice.uniform(0.2, 0.6)
    return data.digits(), lambda: Skipping(share), cross_entropy, cross_entropy


PROBLEMS: dict[str, Callable[[Dice], Problem]] = {
    "dropout": dropout,
    "noise_level": noise_level,
    "timestep": timestep,
    "variational": variational,
    "mixup": mixup,
    "masked": masked,
    "quantiles": quantiles,
    "importance": importance,
    "depth": depth,
}


def draw(dice: Dice, problem: str, optimizer: str) -> Recipe:
    """A problem at a rate at which such nets learn well, or up to three times as much."""
    split, net, loss, held = PROBLEMS[problem](dice)
    batch, steps = dice.choice((8, 16, 32)), int(dice.log(200, 500))
    task = Task(lambda: split, net, loss, held=held, batch=batch, steps=steps)
    rate = usual_rate(dice, optimizer, dice.choice((1.0, 1.0, 3.0)))
    return Recipe(task, rate, {"schedule": dice.choice(("constant", "constant", "cosine"))})


FORMS = forms(
    "chance", draw,
    """dropout/adam dropout/sgd dropout/momentum noise_level/adam noise_level/rmsprop timestep/adam timestep/adamw
    variational/adam variational/adamw mixup/adam mixup/momentum masked/adam masked/sgd quantiles/adam
    quantiles/rmsprop importance/adam importance/momentum depth/adam depth/momentum""", 0.0,
)  # fmt: skip
"""The loss must have fallen."""
