"""A step whose loss takes values that the model itself makes is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from lightning_nanguard import NaNGuard
from lightning_nanguard.diagnosis.step_tracer import StepTracer
from lightning_nanguard.record.trials import TRIALS_FILE
from tests.helpers import Batch, Task, batches, differences, fit, mlp, state_of

NET = nn.Linear(4, 4)
X, LABELS = torch.randn(8, 4), torch.tensor([0, 1, 2, 3] * 2)
CODES = torch.randn(16, 4)


class Normed(nn.Module):
    """Batch norm twice in one step, so that its second call reads running statistics that the first one wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(self.norm(self.first(x)))))


class Recomputed(nn.Module):
    """A layer whose activations are computed again in the backward pass, with a forward pass without a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        again = checkpoint(lambda x: self.first(x).relu(), x.clone().requires_grad_(), use_reentrant=True)
        return self.last(again)


def chained(net: nn.Module) -> Tensor:
    """Negatives that follow the gradient of the model's energy."""
    x = torch.randn(8, 4)
    for _ in range(2):
        x = x.detach().requires_grad_()
        x = x - 0.1 * torch.autograd.grad(net(x).sum(), x)[0]
    return net(X).mean() - net(x.detach()).mean()


def coded(net: nn.Module) -> Tensor:
    """Codes of a codebook, with a straight-through gradient."""
    out = net(X)
    code = CODES[torch.cdist(out, CODES).argmin(1)]
    return F.mse_loss(out + (code - out).detach(), X)


def labelled(net: nn.Module) -> Tensor:
    """Labels that the model itself gives to another view of the batch."""
    with torch.no_grad():
        labels = net(X).argmax(1)
    return F.cross_entropy(net(X + 0.1), labels)


def advantage(net: nn.Module) -> Tensor:
    """Rewards over a detached estimate of the model."""
    return ((X[:, 0] - net(X)[:, 1].detach()) * net(X)[:, 0]).mean()


def hardest(net: nn.Module) -> Tensor:
    """The farthest and the nearest row of each row."""
    apart = torch.cdist(net(X), net(X))
    return (apart.gather(1, apart.argmax(1, keepdim=True)) - apart.gather(1, apart.argmin(1, keepdim=True))).mean()


def routed(net: nn.Module) -> Tensor:
    """The best two of four experts."""
    weight, chosen = net(X).topk(2, 1)
    return (weight.softmax(1) * X.gather(1, chosen)).sum()


def penalty(net: nn.Module) -> Tensor:
    """The norm of a gradient that is itself part of the graph."""
    x = X.clone().requires_grad_()
    return torch.autograd.grad(net(x).sum(), x, create_graph=True)[0].norm()


def huber(net: nn.Module) -> Tensor:
    """A loss with a mask that depends on its own size, beside an accuracy that is only logged."""
    error = net(X) - 1
    assert 0 <= (error.detach().argmax(1) == LABELS).float().mean() <= 1
    return torch.where(error.abs() < 1, 0.5 * error**2, error.abs() - 0.5).mean()


def of_draws(draw: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], Tensor]:
    """A step that weighs outputs by what is drawn of them."""
    return lambda net: (draw(out := net(X)).float().mean() * out).mean()


OWN: list[Callable[[nn.Module], Tensor]] = [
    of_draws(lambda out: Categorical(logits=out).sample()),
    of_draws(lambda out: Bernoulli(logits=out).sample()),
    of_draws(lambda out: Normal(out, 1.0).sample()),
    of_draws(lambda out: torch.multinomial(out.softmax(1), 2)),
    of_draws(lambda out: torch.empty(8, 4).bernoulli_(out.detach().sigmoid())),
    of_draws(lambda out: torch.poisson(out.exp().detach())),
    lambda net: -F.cosine_similarity(net(X), net(X + 0.1).detach()).mean(),
    chained,
    coded,
    labelled,
    advantage,
]
FREE: list[Callable[[nn.Module], Tensor]] = [
    of_draws(lambda out: F.dropout(out, 0.5)),
    of_draws(lambda out: out + torch.randn_like(out)),
    of_draws(lambda out: Normal(out, out.exp()).rsample()),
    of_draws(lambda out: F.gumbel_softmax(out)),
    of_draws(lambda out: torch.bernoulli(torch.full_like(out, 0.3)) * out),
    of_draws(lambda out: torch.normal(torch.zeros_like(out), torch.ones_like(out)) * out),
    of_draws(lambda out: torch.empty_like(out).bernoulli_(0.5) * out),
    of_draws(lambda out: torch.multinomial(torch.ones(8, 4), 2) + out[:, :2]),
    lambda net: F.cross_entropy(net(X), LABELS),
    hardest,
    routed,
    penalty,
    huber,
]


def traced(step: Callable[[nn.Module], Tensor], net: nn.Module) -> bool:
    """Whether a step is said to take targets of its own."""
    with StepTracer(net.parameters()) as trace:
        step(net)
    return trace.own_targets


@pytest.mark.parametrize(("steps", "found"), [(OWN, True), (FREE, False)], ids=["of the model", "free"])
def test_targets_of_the_model_itself(steps: list[Callable[[nn.Module], Tensor]], found: bool) -> None:
    """Draws from the model and detached outputs that the loss takes count; noise, masks and indices do not."""
    assert [traced(step, NET) for step in steps] == [found] * len(steps)


@pytest.mark.parametrize(
    "net", [Normed(), Recomputed(), weight_norm(nn.Linear(4, 4)), nn.TransformerEncoderLayer(4, 2)]
)
def test_parts_of_a_model_are_no_targets(net: nn.Module) -> None:
    """Running statistics, activations that are computed again, and norms of weights are part of the model."""
    assert not traced(lambda net: F.cross_entropy(net(X), LABELS), net)


class Policy(Task):
    """A policy gradient with a moving baseline, whose loss is lowest while the policy is poor."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(mlp(), lambda p: torch.optim.Adam(p, lr=0.03))
        self.register_buffer("baseline", torch.zeros(()))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        chosen = Categorical(logits=self.net(batch[0]))
        action = chosen.sample()
        reward = torch.where(action == 0, batch[0].sum(1), -batch[0].sum(1))
        gain = reward - self.baseline
        self.baseline.mul_(0.9).add_(0.1 * reward.mean())
        return -(chosen.log_prob(action) * gain).mean()


class Normalised(Task):
    """Its step shrinks its weights in place."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(mlp(), lambda p: torch.optim.Adam(p, lr=0.01))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with torch.no_grad():
            for weight in self.net.parameters():
                weight.mul_(0.98)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", [Normalised, Policy])
def test_a_step_that_cannot_be_compared_is_left_alone(kind: type[Task], tmp_path: Path) -> None:
    """A policy gradient and a step that writes to its weights have no trial: the run is, bit for bit, the bare one."""
    bare = fit(kind(), batches(count=200), folder=tmp_path / "bare")
    guard = NaNGuard(act_on="evidence")
    run = fit(kind(), batches(count=200), guard, folder=tmp_path / "guarded")
    assert differences(state_of(bare), state_of(run)) == []
    assert guard.interventions == []
    assert TRIALS_FILE not in {path.name for path in tmp_path.rglob("*.jsonl")}
