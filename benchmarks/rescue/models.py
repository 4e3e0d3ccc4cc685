"""Model families, their losses, and the tasks they are put to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import data
from .data import Batch, Split

Loss = Callable[[nn.Module, Batch, int], Tensor]
"""Loss of a net on a batch; the last argument counts the batches seen so far."""

DONE = 10**9
"""Count of batches to judge with: every switch of a loss over time has been thrown."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is learned, by what, from what.

    Attributes:
        data: Builds the split.
        net: Builds the net.
        loss: Training loss.
        held: Held-out loss, ``None`` where it is the training loss.
        batch: Batch size.
        steps: Optimizer steps of a run.
        shuffle: Whether every epoch has its own order.
        adversarial: Whether it is a GAN, trained by manual optimization.
    """

    data: Callable[[], Split]
    net: Callable[[], nn.Module]
    loss: Loss
    held: Loss | None = None
    batch: int = 32
    steps: int = 240
    shuffle: bool = True
    adversarial: bool = False


# ---------------------------------------------------------------------------------------------------------- nets


def linear(inputs: int, outputs: int = 1) -> nn.Module:
    """One linear layer."""
    return nn.Linear(inputs, outputs)


def mlp(*sizes: int, act: type[nn.Module] = nn.ReLU, dropout: float = 0.0, bias: bool = True) -> nn.Module:
    """Linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(a, b, bias=bias))
        if i < len(sizes) - 2:
            layers.append(act())
            if dropout:
                layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)


def cnn() -> nn.Module:
    """Two convolutions with batch norm."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class Recurrent(nn.Module):
    """A recurrent layer and a linear one on its last output."""

    def __init__(self, kind: type[nn.RNNBase], inputs: int, width: int, outputs: int, **options: str) -> None:
        super().__init__()
        self.inputs = inputs
        self.recurrent = kind(inputs, width, batch_first=True, **options)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.recurrent(x.reshape(len(x), -1, self.inputs))
        return self.head(out[:, -1])  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """One causal pre-norm block over tokens; its mask is a buffer with −inf in it, as masks are."""

    mask: Tensor

    def __init__(self, words: int = 12, length: int = 12, width: int = 24, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.place = nn.Embedding(words, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.head = nn.Linear(width, 48), nn.Linear(48, width), nn.Linear(width, words)
        self.register_buffer("mask", torch.full((length, length), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.place
        q, k, v = self.qkv(self.norm1(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + self.mask, -1)
        h = h + self.out((attention @ v).transpose(1, 2).flatten(2))
        h = h + self.down(functional.gelu(self.up(self.norm2(h))))
        return self.head(self.norm3(h))  # type: ignore[no-any-return]


class Factors(nn.Module):
    """Matrix factorisation: a rating is the inner product of two embeddings and two biases."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(40, 8), nn.Embedding(30, 8)
        self.user_bias, self.item_bias = nn.Embedding(40, 1), nn.Embedding(30, 1)
        for table in (self.user, self.item, self.user_bias, self.item_bias):
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        who, what = x[:, 0], x[:, 1]
        inner = (self.user(who) * self.item(what)).sum(-1)
        return inner + self.user_bias(who)[:, 0] + self.item_bias(what)[:, 0]  # type: ignore[no-any-return]


class Bag(nn.Module):
    """The mean of word embeddings over what is no padding, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(61, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        used = (x > 0).to(torch.float32)[..., None]
        return self.head((self.embed(x) * used).sum(1) / used.sum(1))  # type: ignore[no-any-return]


class Pair(nn.Module):
    """Generator and discriminator of a GAN."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.discriminator = mlp(4, 24, 2), mlp(2, 24, 1, act=nn.Softplus)


class GaussianHead(nn.Module):
    """Mean and log variance."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(10, 24, 2, act=nn.Tanh)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)  # type: ignore[no-any-return]


class TwoHeads(nn.Module):
    """One body, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.digit, self.image = mlp(64, 32, 32), nn.Linear(32, 10), nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x))


def he(net: nn.Module) -> nn.Module:
    """He's initialisation: plain SGD leaves the start at once."""
    for p in net.parameters():
        nn.init.kaiming_normal_(p, nonlinearity="relu") if p.dim() > 1 else nn.init.zeros_(p)
    return net


def small_start() -> nn.Module:
    """A net for large inputs, whose untrained outputs are no larger than those of others."""
    net = mlp(64, 32, 10)
    with torch.no_grad():
        net[0].weight.div_(64)  # type: ignore[index, union-attr]
    return net


def frozen_body() -> nn.Module:
    """A net of which only the last layer learns."""
    net = mlp(64, 64, 10)
    for p in net[0].parameters():  # type: ignore[index]
        p.requires_grad_(False)
    return net


# -------------------------------------------------------------------------------------------------------- losses


def squared(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """Mean squared error."""
    return functional.mse_loss(net(batch[0]).reshape(batch[1].shape), batch[1])


def cross_entropy(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """Cross-entropy from logits."""
    return functional.cross_entropy(net(batch[0]).float(), batch[1])


def binary(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """Binary cross-entropy from logits."""
    return functional.binary_cross_entropy_with_logits(net(batch[0])[:, 0], batch[1])


def next_token(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """Cross-entropy of the next token."""
    words = batch[0]
    return functional.cross_entropy(net(words[:, :-1]).flatten(0, 1).float(), words[:, 1:].flatten())


def reconstruction(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """Mean squared error to the input."""
    return functional.mse_loss(net(batch[0]), batch[0])


def by_hand(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """Cross-entropy as it is written by hand: exp overflows, and the log of what underflowed is −inf."""
    e = net(batch[0]).float().exp()
    return -(e / e.sum(-1, keepdim=True)).log()[torch.arange(len(e)), batch[1]].mean()


def log_ratio(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """Squared error of logarithms: NaN for a negative target, infinite for zero."""
    return (net(batch[0])[:, 0] - batch[1].log()).square().mean()


def root_of_features(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """Cross-entropy of features divided by their norm, whose derivative at zero is NaN while its value is not."""
    features = net[:2](batch[0])  # type: ignore[index]
    norm = features.square().sum(-1, keepdim=True).sqrt()
    return functional.cross_entropy(net[2](4 * features / (norm + 0.1)), batch[1])  # type: ignore[index]


def gaussian_nll(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """Negative log likelihood of a Gaussian with its own variance, without the constant; negative when it goes well."""
    mean, log_variance = net(batch[0]).unbind(-1)
    return (log_variance + (batch[1] - mean).square() * (-log_variance).exp()).mean() / 2


def copied_nll(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """The same for a target that the input determines, so that the loss falls far below zero."""
    mean, log_variance = net(batch[0]).unbind(-1)
    return (log_variance + (batch[0][:, 0] - mean).square() * (-log_variance).exp()).mean() / 2


def hinge(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """Hinge loss: exactly zero once every margin is wide."""
    return torch.relu(1 - (2 * batch[1] - 1) * net(batch[0])[:, 0]).mean()


def weighted(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """Squared error with a weight a row."""
    return (batch[2] * (net(batch[0])[:, 0] - batch[1]).square()).mean()


def reinforce(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """Policy gradient of a bandit whose best arm is the digit: noisy, of either sign, and no measure of progress."""
    policy = torch.distributions.Categorical(logits=net(batch[0]))
    arm = policy.sample()
    reward = (arm == batch[1]).float() * 10
    return -(policy.log_prob(arm) * (reward - reward.mean())).mean()


def regret(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """Expected reward missed by the policy."""
    return 10 - 10 * net(batch[0]).softmax(-1)[torch.arange(len(batch[1])), batch[1]].mean()


def switched_on(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """Two tasks, of which the second, ten times heavier, joins after 100 batches."""
    h = net(batch[0])
    loss = functional.cross_entropy(net.digit(h), batch[1])  # type: ignore[operator]
    return loss + 10 * functional.mse_loss(net.image(h), batch[0]) if n >= 100 else loss  # type: ignore[operator]


def warmed_up_penalty(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """Cross-entropy with a penalty on weights that grows over the run, so that the loss rises while all is well."""
    penalty = sum(p.square().sum() for p in net.parameters())
    return cross_entropy(net, batch, n) + min(n, 300) * 1e-4 * penalty


def contrastive(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """InfoNCE of two noisy views."""
    noise = torch.randn_like(batch[0]) * 0.3
    a, b = (functional.normalize(net(x), dim=-1) for x in (batch[0], batch[0] + noise))
    return functional.cross_entropy(a @ b.T / 0.1, torch.arange(len(a)))


def contrastive_held(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """The same with a view that is always the same."""
    noise = torch.randn(batch[0].shape, generator=torch.Generator().manual_seed(0)) * 0.3
    a, b = (functional.normalize(net(x), dim=-1) for x in (batch[0], batch[0] + noise))
    return functional.cross_entropy(a @ b.T / 0.1, torch.arange(len(a)))


def energy_distance(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """Distance between what the generator makes and the data."""
    noise = torch.randn(len(batch[0]), 4, generator=torch.Generator().manual_seed(0))
    made, real = net.generator(noise), batch[0]  # type: ignore[operator]
    if not torch.isfinite(made).all():
        return torch.tensor(torch.nan)
    return 2 * torch.cdist(made, real).mean() - torch.cdist(made, made).mean() - torch.cdist(real, real).mean()


# --------------------------------------------------------------------------------------------------------- tasks

TASKS: dict[str, Task] = {
    "linear": Task(data.diabetes, lambda: linear(10), squared),
    "logistic": Task(data.cancer, lambda: linear(30), binary),
    "mlp": Task(data.digits, lambda: he(mlp(64, 32, 32, 10)), cross_entropy),
    "wine": Task(data.wine, lambda: mlp(13, 24, 3, act=nn.Tanh), cross_entropy, batch=16),
    "regression": Task(data.diabetes, lambda: mlp(10, 24, 1), squared, steps=320),
    "cnn": Task(data.digits, cnn, cross_entropy),
    "gru": Task(data.digits, lambda: Recurrent(nn.GRU, 8, 24, 10), cross_entropy),
    "rnn": Task(data.waves, lambda: Recurrent(nn.RNN, 1, 16, 1), squared, steps=200),
    "transformer": Task(data.tokens, Transformer, next_token, batch=16),
    "embedding": Task(data.ratings, Factors, squared, batch=64, steps=360),
    "bag": Task(data.bags, Bag, cross_entropy),
    "autoencoder": Task(data.digits, lambda: mlp(64, 32, 12, 32, 64, act=nn.ELU), reconstruction, steps=300),
    "gan": Task(data.points, Pair, energy_distance, batch=64, adversarial=True),
    "pixels": Task(data.pixels, small_start, cross_entropy),
    "log_target": Task(data.diabetes_positive, lambda: mlp(10, 24, 1), log_ratio, steps=320),
    "by_hand": Task(data.digits, lambda: mlp(64, 32, 10), by_hand, held=cross_entropy),
    "root": Task(data.digits, lambda: mlp(64, 32, 10, act=nn.Tanh, bias=False), root_of_features, steps=300),
    "relu_rnn": Task(data.waves, lambda: Recurrent(nn.RNN, 1, 16, 1, nonlinearity="relu"), squared, steps=200),
    "bursts": Task(data.bursts, lambda: Recurrent(nn.RNN, 1, 16, 1, nonlinearity="relu"), squared, steps=240),
    "bursts_mlp": Task(data.bursts, lambda: nn.Sequential(nn.Flatten(), mlp(16, 24, 1)), squared),
    # Only healthy runs from here on.
    "dropout": Task(data.digits, lambda: mlp(64, 64, 10, dropout=0.3), cross_entropy),
    "frozen": Task(data.digits, frozen_body, cross_entropy),
    "nll": Task(data.diabetes, GaussianHead, gaussian_nll),
    "negative": Task(data.diabetes, GaussianHead, copied_nll),
    "student": Task(data.heavy_tails, lambda: mlp(10, 24, 1), squared),
    "student_linear": Task(data.heavy_tails, lambda: linear(10), squared),
    "parity": Task(data.parity, lambda: mlp(20, 32, 2), cross_entropy, steps=400),
    "noisy_labels": Task(data.noisy_labels, lambda: mlp(64, 32, 32, 10), cross_entropy),
    "curriculum": Task(data.curriculum, lambda: mlp(64, 32, 10), cross_entropy, shuffle=False, steps=300),
    "drift": Task(data.drift, lambda: linear(10), squared, shuffle=False, steps=280),
    "rare_weights": Task(data.rare_weights, lambda: mlp(10, 24, 1), weighted),
    "hinge": Task(data.cancer, lambda: mlp(30, 32, 1), hinge),
    "reinforce": Task(data.digits, lambda: mlp(64, 32, 10), reinforce, held=regret),
    "switch": Task(data.digits, TwoHeads, switched_on),
    "penalty": Task(data.digits, lambda: mlp(64, 32, 10), warmed_up_penalty, held=cross_entropy),
    "contrastive": Task(data.digits, lambda: mlp(64, 32, 16), contrastive, held=contrastive_held),
}
