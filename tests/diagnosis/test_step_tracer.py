"""A step that draws its samples from the model itself is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal
from torch.nn import functional as F

from lightning_nanguard import NaNGuard
from lightning_nanguard.diagnosis.step_tracer import StepTracer
from lightning_nanguard.record.trials import TRIALS_FILE
from tests.helpers import Batch, Task, batches, differences, fit, mlp, state_of

NET = nn.Linear(4, 4)
OF_MODEL: list[Callable[[Tensor], Tensor]] = [
    lambda out: Categorical(logits=out).sample(),
    lambda out: Bernoulli(logits=out).sample(),
    lambda out: Normal(out, 1.0).sample(),
    lambda out: torch.multinomial(out.detach().softmax(1), 2),
    lambda out: torch.empty(8, 4).bernoulli_(out.detach().sigmoid()),
    lambda out: torch.poisson(out.exp().detach()),
]
NOISE: list[Callable[[Tensor], Tensor]] = [
    lambda out: F.dropout(out, 0.5),
    lambda out: out + torch.randn_like(out),
    lambda out: Normal(out, out.exp()).rsample(),
    lambda out: F.gumbel_softmax(out),
    lambda out: torch.bernoulli(torch.full_like(out, 0.3)) * out,
    lambda out: torch.normal(torch.zeros_like(out), torch.ones_like(out)) * out,
    lambda out: torch.empty_like(out).bernoulli_(0.5) * out,
    lambda out: torch.multinomial(torch.ones(8, 4), 2) + out[:, :2],
]


@pytest.mark.parametrize(("steps", "found"), [(OF_MODEL, True), (NOISE, False)], ids=["of the model", "noise"])
def test_draws_of_the_model_and_noise(steps: list[Callable[[Tensor], Tensor]], found: bool) -> None:
    """A distribution whose parameters are computed from the weights counts, with or without a graph; noise does not."""
    for number, step in enumerate(steps):
        with StepTracer(NET.parameters()) as trace:
            step(NET(torch.randn(8, 4)))
        assert trace.draws is found, number


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


def test_a_policy_gradient_is_left_alone(tmp_path: Path) -> None:
    """Its loss does not show which weights are better, so no trial is made: the run is bit for bit the bare one."""
    bare = fit(Policy(), batches(count=200), folder=tmp_path / "bare")
    guard = NaNGuard(act_on="evidence")
    run = fit(Policy(), batches(count=200), guard, folder=tmp_path / "guarded")
    assert differences(state_of(bare), state_of(run)) == []
    assert guard.interventions == []
    assert TRIALS_FILE not in {path.name for path in tmp_path.rglob("*.jsonl")}
