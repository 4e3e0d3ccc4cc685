"""Data sets: scikit-learn's bundled ones and generated ones, each with one fixed held-out split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from sklearn import datasets
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

Batch = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Split:
    """Tensors to train on and tensors held out, row by row."""

    train: Batch
    held: Batch


class Rows(Dataset[Batch]):
    """Rows of tensors, fetched a batch at a time."""

    def __init__(self, tensors: Batch) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> Batch:
        return tuple(t[index] for t in self.tensors)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        rows = torch.tensor(indices)
        return tuple(t[rows] for t in self.tensors)


def _as_it_is(batch: Any) -> Any:
    return batch


def loader(
    tensors: Batch, batch_size: int, *, shuffle: bool, seed: int, rank: int = 0, ranks: int = 1
) -> DataLoader[Batch]:
    """A loader whose order depends on ``seed`` alone; each rank takes every ``ranks``-th row."""
    rows = Rows(tensors)
    share = DistributedSampler(rows, ranks, rank, shuffle, seed, drop_last=True) if ranks > 1 else None
    return DataLoader(
        rows,
        batch_size=max(1, min(batch_size, len(rows)) // ranks),
        shuffle=shuffle and share is None,
        sampler=share,
        drop_last=True,
        collate_fn=_as_it_is,
        generator=torch.Generator().manual_seed(seed),
    )


def _split(train: int, *tensors: Tensor) -> Split:
    order = torch.randperm(len(tensors[0]), generator=torch.Generator().manual_seed(0))
    shuffled = [t[order] for t in tensors]
    return Split(tuple(t[:train] for t in shuffled), tuple(t[train:] for t in shuffled))


def _standard(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0).clamp_min(1e-6)


def _bundled(load: Callable[..., Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, y = load(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=dtype)


@lru_cache
def digits() -> Split:
    """8×8 images of ten digits, pixels in −1…1."""
    x, y = _bundled(datasets.load_digits, torch.long)
    return _split(1200, x / 8 - 1, y)


@lru_cache
def pixels() -> Split:
    """The same images as they come from a file, in 0…255."""
    x, y = _bundled(datasets.load_digits, torch.long)
    return _split(1200, (x * 16).clamp_max(255), y)


@lru_cache
def wine() -> Split:
    """Three kinds of wine, 13 measurements."""
    x, y = _bundled(datasets.load_wine, torch.long)
    return _split(128, _standard(x), y)


@lru_cache
def cancer() -> Split:
    """Two diagnoses, 30 measurements."""
    x, y = _bundled(datasets.load_breast_cancer, torch.float32)
    return _split(400, _standard(x), y)


@lru_cache
def diabetes() -> Split:
    """Progression of diabetes, standardised."""
    x, y = _bundled(datasets.load_diabetes, torch.float32)
    return _split(330, _standard(x), _standard(y))


@lru_cache
def diabetes_positive() -> Split:
    """Progression of diabetes as a positive number around 1.5, for losses under a logarithm."""
    x, y = _bundled(datasets.load_diabetes, torch.float32)
    return _split(330, _standard(x), y / 100)


@lru_cache
def waves() -> Split:
    """Sine waves of length 17 with noise: 16 values and the next one."""
    g = torch.Generator().manual_seed(1)
    phase, speed = torch.rand(1000, 1, generator=g) * 6.28, 0.2 + 0.6 * torch.rand(1000, 1, generator=g)
    x = torch.sin(phase + speed * torch.arange(17)) + 0.05 * torch.randn(1000, 17, generator=g)
    return _split(800, x[:, :16, None], x[:, 16])


@lru_cache
def bursts() -> Split:
    """The same waves, of which one in a hundred is forty times as high."""
    clean = waves()
    g = torch.Generator().manual_seed(12)
    height = torch.where(torch.rand(800, generator=g) < 0.01, 40.0, 1.0)
    return Split((clean.train[0] * height[:, None, None], clean.train[1] * height), clean.held)


@lru_cache
def tokens() -> Split:
    """Sentences of 13 tokens out of 12 from a Markov chain with few likely successors."""
    g = torch.Generator().manual_seed(2)
    chain = torch.softmax(3 * torch.randn(12, 12, generator=g), -1)
    words = [torch.randint(12, (1000,), generator=g)]
    for _ in range(12):
        words.append(torch.multinomial(chain[words[-1]], 1, generator=g)[:, 0])
    return _split(800, torch.stack(words, 1))


@lru_cache
def bags() -> Split:
    """Bags of up to 10 words out of 60, padded with 0, of four subjects."""
    g = torch.Generator().manual_seed(3)
    subject = torch.randint(4, (1200,), generator=g)
    likely = torch.softmax(1.5 * torch.randn(4, 60, generator=g), -1)
    words = 1 + torch.multinomial(likely[subject], 10, replacement=True, generator=g)
    length = torch.randint(5, 11, (1200, 1), generator=g)
    return _split(1000, words.masked_fill(torch.arange(10) >= length, 0), subject)


@lru_cache
def ratings() -> Split:
    """Ratings of 30 items by 40 users, of rank three."""
    g = torch.Generator().manual_seed(4)
    user, item = torch.randn(40, 3, generator=g), torch.randn(30, 3, generator=g)
    who, what = torch.randint(40, (3000,), generator=g), torch.randint(30, (3000,), generator=g)
    score = (user[who] * item[what]).sum(-1) / 3**0.5 + 0.1 * torch.randn(3000, generator=g)
    return _split(2500, torch.stack([who, what], 1), score)


@lru_cache
def points() -> Split:
    """Points of the plane around (2, −1), for a GAN."""
    g = torch.Generator().manual_seed(5)
    mix = torch.tensor([[0.6, 0.2], [0.0, 0.4]])
    return _split(1000, torch.randn(1500, 2, generator=g) @ mix + torch.tensor([2.0, -1.0]))


@lru_cache
def parity() -> Split:
    """Parity of 20 bits: nothing a small net learns in a few hundred steps."""
    g = torch.Generator().manual_seed(6)
    x = torch.randint(2, (2000, 20), generator=g).float()
    return _split(1500, 2 * x - 1, x.sum(-1).long() % 2)


@lru_cache
def heavy_tails() -> Split:
    """Diabetes with noise of a Student distribution with 1.5 degrees of freedom on the training targets."""
    clean = diabetes()
    g = torch.Generator().manual_seed(7)
    normal, chi = torch.randn(330, generator=g), torch.randn(330, 3, generator=g).square().sum(-1) / 3
    return Split((clean.train[0], clean.train[1] + normal / chi.pow(0.9)), clean.held)


@lru_cache
def noisy_labels() -> Split:
    """Digits of which four labels in ten were drawn at random."""
    clean = digits()
    g = torch.Generator().manual_seed(8)
    wrong = torch.rand(1200, generator=g) < 0.4
    labels = torch.where(wrong, torch.randint(10, (1200,), generator=g), clean.train[1])
    return Split((clean.train[0], labels), clean.held)


@lru_cache
def curriculum() -> Split:
    """Digits in order of difficulty: two classes for a third of a pass, then all ten with noise on top."""
    clean = digits()
    x, y = clean.train
    easy = (y < 2).nonzero()[:, 0]
    g = torch.Generator().manual_seed(9)
    first = easy[torch.randint(len(easy), (3200,), generator=g)]
    then = torch.randint(len(y), (6400,), generator=g)
    rows = torch.cat([first, then])
    noise = torch.randn(len(rows), 64, generator=g) * 0.6
    noise[: len(first)] = 0
    return Split((x[rows] + noise, y[rows]), clean.held)


@lru_cache
def drift() -> Split:
    """A linear relation whose slope and noise change in mid-run: the loss rises because the data changed."""
    g = torch.Generator().manual_seed(10)
    x = torch.randn(9600, 10, generator=g)
    slope = torch.randn(10, generator=g)
    y = x @ slope
    y[4800:] = x[4800:] @ (slope + 2 * torch.randn(10, generator=g)) + 2 * torch.randn(4800, generator=g)
    return Split((x[:9300], y[:9300]), (x[9300:], y[9300:]))


@lru_cache
def rare_weights() -> Split:
    """Diabetes with a weight a row: one in fifty counts two hundred times."""
    clean = diabetes()
    g = torch.Generator().manual_seed(11)
    weight = torch.where(torch.rand(330, generator=g) < 0.02, 200.0, 1.0)
    return Split((*clean.train, weight), (*clean.held, torch.ones(len(clean.held[1]))))
