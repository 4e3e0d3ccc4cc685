"""The state of now against a snapshot."""

from __future__ import annotations

import pytest
import torch
from torch import nn, optim

from lightning_nanguard.diagnosis.state_comparison import state_of_snapshot, unexplained_change
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.state.snapshot import capture
from lightning_nanguard.thresholds.diagnosis import StateChangeThresholds


def learner() -> Learner:
    net = nn.Linear(8, 8)
    return Learner(net, [optim.SGD(net.parameters(), 0.1)])


def test_code_runs_with_the_state_of_a_snapshot() -> None:
    """Weights are those of the snapshot inside, and those of now again behind it, also where the code raises."""
    trained = learner()
    weight = trained.module.weight
    good = capture(trained, step=0, global_step=0)
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    now = weight.detach().clone()
    with state_of_snapshot(trained, good):
        assert torch.equal(weight, before)
    assert torch.equal(weight, now)
    with pytest.raises(RuntimeError, match="size of tensor a"), state_of_snapshot(trained, good):
        weight.detach().mul_(2.0).add_(torch.ones(7))
    assert torch.equal(weight, now)


def test_a_stray_element_is_told_from_an_update() -> None:
    """An update moves all elements alike; one that moved far more, and out of their range, is named."""
    trained = learner()
    weight = trained.module.weight
    good = capture(trained, step=0, global_step=0)
    with torch.no_grad():
        weight.add_(0.01 * torch.randn(8, 8))
    assert unexplained_change(trained, good) is None
    with torch.no_grad():
        weight[2, 3] = 1e5
    change = unexplained_change(trained, good)
    assert change is not None
    assert (change.name, change.now) == ("parameter weight", 1e5)
    assert change.usual < 0.1
    assert unexplained_change(trained, good, StateChangeThresholds(moved_factor=1e9)) is None


def test_an_element_that_alone_has_a_gradient() -> None:
    """The bias of the only output that is used has no other elements to be compared with: the other weights show
    whether an update moved it so far."""
    for diverged in (True, False):
        trained = learner()
        good = capture(trained, step=0, global_step=0)
        with torch.no_grad():
            trained.module.bias[3] = -5e5
            trained.module.weight.add_(torch.randn(8, 8), alpha=1e7 if diverged else 1e-3)
        change = unexplained_change(trained, good)
        assert change is not None
        assert (change.name, change.usual, change.updated) == ("parameter bias", 0.0, diverged)
