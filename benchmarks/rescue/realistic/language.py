"""Language models over characters, on the documentation that Python itself carries."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.rescue.data import Split
from benchmarks.rescue.models import Task, next_token

CHARACTERS = 96
"""Printable ASCII, and one for everything else."""

CONTEXT = 64


@lru_cache
def text() -> Split:
    """Windows of 65 characters of the help topics of :mod:`pydoc`."""
    from pydoc_data.topics import topics

    written = "\n".join(topics[name] for name in sorted(topics))[:200_000]
    codes = torch.tensor([ord(c) - 31 if 32 <= ord(c) < 127 else 0 for c in written])
    rows = codes[: len(codes) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return Split((rows[64:],), (rows[:64],))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, *, causal: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.causal, self.dropout = heads, causal, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        h = h + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        return h + self.dropout(self.down(functional.gelu(self.up(self.norm2(h)))))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """A small GPT with the initialisation of GPT-2."""

    def __init__(self, width: int = 64, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(CHARACTERS, width), nn.Parameter(torch.zeros(CONTEXT, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CHARACTERS, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)
        for block in self.blocks:
            for last in (block.out, block.down):
                nn.init.normal_(last.weight, std=0.02 / (2 * layers) ** 0.5)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x) + self.place[: x.shape[1]])))  # type: ignore[no-any-return]


class CharLSTM(nn.Module):
    """An LSTM over characters."""

    def __init__(self, width: int = 144) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(CHARACTERS, 48), nn.Linear(width, CHARACTERS)
        self.recurrent = nn.LSTM(48, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embed(x))[0])  # type: ignore[no-any-return]


TASKS: dict[str, Task] = {
    "gpt": Task(text, GPT, next_token, batch=16, steps=240),
    "lstm": Task(text, CharLSTM, next_token, batch=16, steps=240),
}
