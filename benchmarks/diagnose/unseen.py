"""Models that no rule about silent mistakes was built on: other layers, norms, activations and ways to join them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from .problems import Dice


class Residual(nn.Module):
    """Blocks whose results are added up, each scaled by a parameter that begins small."""

    def __init__(self, width: int, depth: int, p: float) -> None:
        super().__init__()
        self.enter = nn.Linear(64, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Dropout(p),
                          nn.Linear(2 * width, width))
            for _ in range(depth)
        )  # fmt: skip
        self.scales = nn.ParameterList(nn.Parameter(0.1 * torch.ones(width)) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        for block, scale in zip(self.blocks, self.scales, strict=True):
            h = h + scale * block(h)
        return h  # type: ignore[no-any-return]


class Mixer(nn.Module):
    """Rows and columns of an image mixed in turn."""

    def __init__(self, width: int, p: float) -> None:
        super().__init__()
        self.rows = nn.Sequential(nn.Linear(8, 16), nn.Mish(), nn.Linear(16, 8))
        self.columns = nn.Sequential(nn.Linear(8, 16), nn.Mish(), nn.AlphaDropout(p), nn.Linear(16, 8))
        self.leave = nn.Linear(64, width)

    def forward(self, x: Tensor) -> Tensor:
        h = x.reshape(-1, 8, 8)
        h = h + self.rows(h)
        h = h + self.columns(h.transpose(1, 2)).transpose(1, 2)
        return self.leave(h.flatten(1))  # type: ignore[no-any-return]


class Words(nn.Module):
    """Pixels as words: an embedding, a place for each, and attention with the norm first."""

    def __init__(self, width: int, p: float) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(8, width), nn.Embedding(64, width)
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, dropout=p, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        index = ((x + 1) * 4).long().clamp(0, 7)
        h = self.words(index) + self.places.weight
        n = self.norm(h)
        return (h + self.attention(n, n, n, need_weights=False)[0]).mean(1)  # type: ignore[no-any-return]


class Excited(nn.Module):
    """Depthwise convolutions, group norm, and a gate for each channel."""

    def __init__(self, width: int, p: float) -> None:
        super().__init__()
        self.wide = nn.Conv2d(1, 12, 1)
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm, self.act, self.drop = nn.GroupNorm(3, 12), nn.PReLU(), nn.Dropout2d(p)
        self.gate = nn.Sequential(nn.Linear(12, 4), nn.Hardswish(), nn.Linear(4, 12), nn.Sigmoid())
        self.leave = nn.Linear(12 * 16, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.act(self.norm(self.deep(self.wide(x.reshape(-1, 1, 8, 8))))))
        h = nn.functional.avg_pool2d(h * self.gate(h.mean((2, 3)))[:, :, None, None], 2)
        return self.leave(h.flatten(1))  # type: ignore[no-any-return]


class Highway(nn.Module):
    """A gate between a transformation and what it was given; a plain recurrent net before it."""

    def __init__(self, width: int, p: float) -> None:
        super().__init__()
        self.inner = nn.RNN(8, width, 2, batch_first=True, dropout=p, bidirectional=False)
        self.gate, self.value = nn.Linear(width, width), nn.Bilinear(width, width, width)
        nn.init.constant_(self.gate.bias, -1.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x.reshape(-1, 8, 8))[0][:, -1]
        g = torch.sigmoid(self.gate(h))
        return g * self.value(h, h) + (1 - g) * h  # type: ignore[no-any-return]


def unseen(dice: Dice, width: int, *, drops: bool = True) -> nn.Module:
    """A model from 64 pixels to features; with dropout where ``drops``."""
    p = dice.uniform(0.1, 0.4) if drops else 0.0
    match dice.choice(["residual", "mixer", "words", "excited", "highway", "weight norm", "spectral"]):
        case "residual":
            return Residual(width, dice.randint(1, 3), p)
        case "mixer":
            return Mixer(width, p)
        case "words":
            return Words(width, p)
        case "excited":
            return Excited(width, p)
        case "highway":
            return Highway(width, p)
        case "weight norm":
            hidden = parametrizations.weight_norm(nn.Linear(64, width))
            return nn.Sequential(hidden, nn.CELU(), *([nn.Dropout(p)] if drops else []), nn.Linear(width, width))
    hidden = parametrizations.spectral_norm(nn.Linear(64, width))
    return nn.Sequential(hidden, nn.Softplus(), *([nn.Dropout(p)] if drops else []), nn.Linear(width, width))
