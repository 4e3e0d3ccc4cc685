"""What is trained: real modules in a real Trainer, on made-up data, since only time matters here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

Batch = tuple[Tensor, Tensor]


class Classifier(pl.LightningModule):
    """Any network under cross entropy and AdamW.

    Args:
        net: Gives logits whose last dimension is the classes.
        fused: Whether AdamW is fused.
        rate: One at which it learns, as runs do: below half of the untrained loss the guard looks at less.
    """

    def __init__(self, net: nn.Module, *, fused: bool = False, rate: float = 1e-3) -> None:
        super().__init__()
        self.net = net
        self.fused = fused
        self.rate = rate
        self.last: Tensor | None = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        loss = F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())
        self.last = loss.detach()
        return loss

    def on_train_epoch_end(self) -> None:
        # Once an epoch, for those who watch a logged value: to log each step would cost more than any of them.
        if self.last is not None:
            self.log("loss", self.last)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if self.fused and gradient_clip_val:
            # Lightning refuses to in mixed precision, though bfloat16 has no scaler.
            nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.rate, fused=self.fused)


class Residual(nn.Module):
    """Two convolutions with batch norm around a sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.first(x)))
        return F.relu(x + self.norm2(self.second(y)))


def resnet(blocks: int = 4, channels: int = 32) -> nn.Module:
    """A small residual network for 16 by 16 images."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), *(Residual(channels) for _ in range(blocks)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10),
    )  # fmt: skip


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads).unbind(2)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A decoder in the shape of GPT-2, its head tied to its embedding."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.places.weight[: x.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)


class Pieces(nn.Module):
    """A linear layer whose weight lies in ``count`` parameters.

    Args:
        count: Number of parameters.
        size: Elements of each.
    """

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.pieces = nn.ParameterList(nn.Parameter(0.01 * torch.randn(size)) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.cat(list(self.pieces)).view(16, -1)
        return x[:, :1] * weight.sum(1) + x[:, :16]


@dataclass(frozen=True)
class Workload:
    """A model with its data and how it is trained and measured.

    Attributes:
        title: For tables.
        make: Makes the module.
        batch: Makes a batch, on the CPU.
        steps: Steps of a half turn; with the two that are not counted an odd number, so that what comes every so many
            steps does not come in the same of them each time.
        rounds: Turns of each contender that matters most; of others a fifth.
        precision: The Trainer's.
        few: Whether only the contenders that matter most are measured.
    """

    title: str
    make: Callable[[], Classifier]
    batch: Callable[[], Batch]
    steps: int
    rounds: int
    precision: Any = "32-true"
    few: bool = False

    def rounds_of(self, matters: bool) -> int:
        """Turns of a contender."""
        return self.rounds if matters else max(2, self.rounds // 5)

    def loader(self, steps: int) -> DataLoader[Any]:
        """The same batch ``steps`` times."""
        return DataLoader([self.batch()] * steps, batch_size=None)


def _vectors(size: int, width: int) -> Batch:
    return torch.randn(size, width), torch.randint(0, 10, (size,))


def _words(size: int, length: int, vocabulary: int) -> Batch:
    return torch.randint(0, vocabulary, (size, length)), torch.randint(0, vocabulary, (size, length))


def _mlp(*, fused: bool = False) -> Classifier:
    return Classifier(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)), fused=fused)


def _gpt(layers: int, width: int, heads: int) -> Classifier:
    return Classifier(GPT(layers, width, heads, 50257, 1024), fused=True)


CPU: dict[str, Workload] = {
    "mlp": Workload("MLP, 2 layers, 9.6k", _mlp, lambda: _vectors(32, 64), 99, 60),
    "resnet": Workload(
        "residual CNN, 75k", lambda: Classifier(resnet()), lambda: (torch.randn(8, 3, 16, 16), _vectors(8, 1)[1]),
        5, 150,
    ),
    "transformer": Workload(
        "transformer, 4 layers, 0.9M", lambda: Classifier(GPT(4, 128, 4, 256, 64)), lambda: _words(8, 64, 256), 5, 60
    ),
    "pieces": Workload(
        "10,000 parameters of 16", lambda: Classifier(Pieces(10_000, 16), fused=True), lambda: _vectors(8, 16), 3, 12,
        few=True,
    ),
}  # fmt: skip
CUDA: dict[str, Workload] = {
    "mlp": Workload("MLP, 2 layers, 9.6k", lambda: _mlp(fused=True), lambda: _vectors(32, 64), 99, 20),
    "gpt2-124m": Workload(
        "GPT-2, 124M, bf16", lambda: _gpt(12, 768, 12), lambda: _words(8, 1024, 50257), 11, 20, "bf16-mixed"
    ),
    "gpt2-350m": Workload(
        "GPT-2, 350M, bf16", lambda: _gpt(24, 1024, 16), lambda: _words(4, 1024, 50257), 9, 10, "bf16-mixed", few=True
    ),
    "gpt2-1.5b": Workload(
        "GPT-2, 1.5B, bf16", lambda: _gpt(48, 1600, 25), lambda: _words(2, 1024, 50257), 7, 6, "bf16-true", few=True
    ),
    "pieces": Workload(
        "10,000 parameters of 16", lambda: Classifier(Pieces(10_000, 16), fused=True), lambda: _vectors(8, 16), 5, 5,
        few=True,
    ),
}  # fmt: skip
