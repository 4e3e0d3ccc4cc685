"""A variational autoencoder and a normalizing flow of digits."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.rescue.data import Batch, Split, digits
from benchmarks.rescue.models import Task, mlp


class VAE(nn.Module):
    """Encoder and decoder with 12 latent variables."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = mlp(64, 400, 300, 24, act=nn.SiLU), mlp(12, 300, 400, 64, act=nn.SiLU)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encode(x).float().chunk(2, -1)
        z = mean + (log_variance / 2).exp() * torch.randn_like(mean) if self.training else mean
        return self.decode(z).float(), mean, log_variance


def elbo(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """Negative evidence bound by image; in evaluation mode at the mean of the latent variables."""
    images = batch[0] / 2 + 0.5
    made, mean, log_variance = net(batch[0])
    missed = functional.binary_cross_entropy_with_logits(made, images, reduction="none").sum(-1)
    return (missed + (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1) / 2).mean()


@lru_cache
def smooth_digits() -> Split:
    """Digits, those held out with a little noise, so that they have a density."""
    held = digits().held[0]
    return Split(
        digits().train[:1], (held + 0.2 * torch.randn(held.shape, generator=torch.Generator().manual_seed(40)),)
    )


class Flow(nn.Module):
    """Affine couplings (RealNVP): every one transforms half of the pixels by what the other half says."""

    def __init__(self, layers: int = 6, width: int = 192) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(mlp(32, width, width, 64, act=nn.SiLU) for _ in range(layers))
        for coupling in self.couplings:
            nn.init.zeros_(coupling[-1].weight)  # type: ignore[index, arg-type]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        grown = torch.zeros(len(x))
        kept, moved = x[:, ::2], x[:, 1::2]
        for coupling in self.couplings:
            scale, shift = coupling(kept).float().chunk(2, -1)
            scale = 2 * torch.tanh(scale / 2)
            kept, moved, grown = moved * scale.exp() + shift, kept, grown + scale.sum(-1)
        return torch.cat([kept, moved], -1), grown


def density(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """Negative log likelihood by pixel, of digits with other noise each time."""
    return density_held(net, (batch[0] + 0.2 * torch.randn_like(batch[0]),), n)


def density_held(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """The same of the digits as they are."""
    z, grown = net(batch[0])
    return ((z.square() + math.log(2 * math.pi)).sum(-1) / 2 - grown).mean() / z.shape[-1]  # type: ignore[no-any-return]


TASKS: dict[str, Task] = {
    "vae": Task(digits, VAE, elbo, batch=64, steps=280),
    "flow": Task(smooth_digits, Flow, density, held=density_held, batch=64, steps=260),
}
