"""A vision transformer, a residual net and a U-Net on scikit-learn's digits."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.rescue.data import Split, digits
from benchmarks.rescue.models import Task, cross_entropy, squared

from .language import Block


def enlarged(rows: Tensor) -> Tensor:
    """Images of 16×16 from rows of 64 pixels."""
    return functional.interpolate(rows.view(-1, 1, 8, 8), size=(16, 16), mode="bilinear")


@lru_cache
def noisy_digits() -> Split:
    """Digits of 16×16 under noise, and the same without."""
    parts = []
    for i, rows in enumerate((digits().train[0], digits().held[0][:256])):
        clean = enlarged(rows)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(20 + i))
        parts.append((clean + 0.7 * noise, clean))
    return Split(*parts)


class VisionTransformer(nn.Module):
    """A vision transformer over 16 patches, with dropout."""

    def __init__(self, width: int = 64, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.first, self.place = nn.Parameter(torch.zeros(width)), nn.Parameter(0.02 * torch.randn(17, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False, dropout=0.1) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(len(x), 16, 4)
        h = torch.cat([self.first.expand(len(x), 1, -1), self.embed(patches)], 1) + self.place
        return self.head(self.norm(self.blocks(h)[:, 0]))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """Two convolutions with batch norm beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.short = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(h + self.short(x))


def residual_net() -> nn.Module:
    """Four residual blocks in two stages."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 24, 3, 1, 1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        *(Residual(24, 24), Residual(24, 24), Residual(24, 64, 2), Residual(64, 64)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def _double(inputs: int, outputs: int) -> nn.Module:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.SiLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """A U-Net of three levels that takes noise off images."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down1, self.down2 = _double(1, width), _double(width, 2 * width)
        self.bottom = _double(2 * width, 4 * width)
        self.up2, self.up1 = _double(6 * width, 2 * width), _double(3 * width, width)
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(functional.avg_pool2d(a, 2))
        c = self.bottom(functional.avg_pool2d(b, 2))
        b = self.up2(torch.cat([b, functional.interpolate(c, scale_factor=2)], 1))
        a = self.up1(torch.cat([a, functional.interpolate(b, scale_factor=2)], 1))
        return self.out(a)  # type: ignore[no-any-return]


TASKS: dict[str, Task] = {
    "vit": Task(digits, VisionTransformer, cross_entropy, steps=240),
    "resnet": Task(digits, residual_net, cross_entropy, batch=24, steps=200),
    "unet": Task(noisy_digits, UNet, squared, batch=12, steps=240),
}
