"""Small language models at large rates, with clipping, warm-up and decay."""

from __future__ import annotations

from functools import lru_cache

import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.rescue import data
from benchmarks.rescue.data import Batch, Split
from benchmarks.rescue.models import Task, Transformer, next_token

from .forms import Dice, Recipe, forms

LENGTH = 24


@lru_cache
def text() -> tuple[Tensor, int]:
    """The descriptions that scikit-learn gives of its data sets, as numbers of characters, and how many there are."""
    loads = (datasets.load_breast_cancer, datasets.load_wine, datasets.load_iris, datasets.load_digits)
    read = "".join(load().DESCR for load in loads)
    letters = sorted(set(read))
    return torch.tensor([letters.index(c) for c in read]), len(letters)


@lru_cache
def passages() -> Split:
    """Passages of the text; the last tenth is held out."""
    ids, _ = text()
    rows = ids.unfold(0, LENGTH + 1, 3)
    cut = len(rows) * 9 // 10
    return Split((rows[:cut],), (rows[cut + LENGTH // 3 + 1 :],))


class RecurrentModel(nn.Module):
    """A recurrent language model with dropout."""

    def __init__(self, cell: type[nn.RNNBase], words: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embed, self.drop = nn.Embedding(words, width), nn.Dropout(dropout)
        self.recurrent, self.head = cell(width, width, batch_first=True), nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.recurrent(self.drop(self.embed(x)))[0]))  # type: ignore[no-any-return]


class WindowModel(nn.Module):
    """The last four characters, embedded, through an MLP."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(words, 16), nn.Linear(64, width), nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.pad(self.embed(x), (0, 0, 3, 0))
        window = torch.cat([h[:, i : i + x.shape[1]] for i in range(4)], -1)
        return self.head(torch.tanh(self.up(window)))  # type: ignore[no-any-return]


RATES = {
    "adam": (5e-3, 1e-1),
    "adamw": (5e-3, 1e-1),
    "rmsprop": (2e-3, 2e-2),
    "sgd": (0.5, 8.0),
    "momentum": (0.05, 1.0),
}
"""Rates from large to about the largest under clipping, for recurrent models and windows."""


def loss_of_characters(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """Cross-entropy of the next character, without the first four."""
    words = batch[0]
    scores = net(words[:, :-1])[:, 3:]
    return functional.cross_entropy(scores.flatten(0, 1).float(), words[:, 4:].flatten())


def draw(dice: Dice, model: str, optimizer: str) -> Recipe:
    """A model of characters, or a transformer of the suite's sentences, at a large rate with clipping."""
    _, words = text()
    width, dropout = dice.choice((32, 48, 64)), dice.choice((0.0, 0.1, 0.3))
    cells = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
    steps, batch = int(dice.log(150, 300)), dice.choice((8, 16))
    low, high = RATES[optimizer]
    if model == "transformer":
        task = Task(data.tokens, lambda: Transformer(width=24), next_token, batch=batch, steps=steps)
        high = min(high, 3e-2) if optimizer in ("adam", "adamw") else high
    elif model == "gpt":
        task = Task(passages, lambda: Transformer(words, LENGTH, 32), next_token, batch=batch, steps=steps)
        high = min(high, 3e-2) if optimizer in ("adam", "adamw") else high
    elif model == "window":
        task = Task(passages, lambda: WindowModel(words, 2 * width), loss_of_characters, batch=batch, steps=steps)
    else:
        cell = cells[model]
        task = Task(passages, lambda: RecurrentModel(cell, words, width, dropout), next_token, batch=batch, steps=steps)
    options = {
        "clip_val": dice.choice((0.25, 0.5, 1.0, 1.0)),
        "schedule": dice.choice(("constant", "cosine", "onecycle", "onecycle", "warmup", "exponential")),
    }
    return Recipe(task, dice.log(low, high), options)


FORMS = forms(
    "language", draw,
    """lstm/adam lstm/adamw lstm/sgd gru/adam gru/rmsprop rnn/momentum rnn/adam gpt/adamw gpt/adam gpt/sgd
    transformer/adamw transformer/momentum window/adam window/rmsprop""", 0.05,
)  # fmt: skip
"""The loss must have fallen by a twentieth: a large rate that learns nothing is not healthy."""
