"""First moments that no sequence of gradients makes."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from torch import nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RAdam
from torch.optim.lr_scheduler import OneCycleLR

from lightning_nanguard import NaNGuard
from lightning_nanguard.state.device import OutOfMemory
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.state.moment_bound import MomentBound, largest_ratio
from tests.helpers import FaultAt, batches, fit, task

EXP_AVG = ("optimizer", 0, "weight", "exp_avg")
OPTIMIZERS = {
    "adam": Adam,
    "amsgrad": partial(Adam, amsgrad=True),
    "adamw": partial(AdamW, betas=(0.8, 0.95)),
    "nadam": NAdam,
    "radam": partial(RAdam, betas=(0.95, 0.999)),
    "fused": partial(AdamW, fused=True),
}


def made(make: Any = Adam, size: int = 64) -> tuple[nn.Linear, Any, MomentBound]:
    torch.manual_seed(0)
    net = nn.Linear(size, 1, bias=False)
    optimizer = make(net.parameters(), lr=1e-3)
    return net, optimizer, MomentBound(Learner(net, [optimizer]))


def beyond(net: nn.Module, optimizer: Optimizer, bound: MomentBound) -> set[Any]:
    screen = bound.screen(dict(Learner(net, [optimizer]).leaves()))
    assert screen.arrived()
    return bound.beyond(screen)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_gradients_break_the_bound(name: str) -> None:
    """Gradients that come as close to the bound as any, tiny ones whose squares underflow, ones that stop, start again
    and change their size by forty orders of magnitude are all within it; a moment that was made larger is not."""
    net, optimizer, bound = made(OPTIMIZERS[name])
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    ratio = largest_ratio(beta1, beta2)
    assert ratio is not None
    closest = 0.0
    with torch.no_grad():
        sizes = 10.0 ** torch.linspace(-38, 9, 64)
        for step in range(300):
            grows = (beta1 / beta2) ** (300 - step)
            net.weight.grad = (sizes * (grows if step % 2 or step > 150 else torch.randn(64))).reshape(1, -1)
            if step % 40 == 39:
                net.weight.grad.zero_()
            if step == 200:
                sizes = sizes.flip(0)
            optimizer.step()
            assert beyond(net, optimizer, bound) == set()
            state = optimizer.state[net.weight]
            first, second = state["exp_avg"].double(), state["exp_avg_sq"].double()
            closest = max(closest, float((first.square() / second)[second > 1e-20].max()) / ratio)
    assert closest > 0.5
    state["exp_avg"][0, 40] = 2 * float((ratio * state["exp_avg_sq"][0, 40]).sqrt()) + 1e-3
    assert beyond(net, optimizer, bound) == {EXP_AVG}
    state["exp_avg"][0, 40] = 1e30
    assert beyond(net, optimizer, bound) == {EXP_AVG}


def test_the_bound() -> None:
    """It needs betas under which it is finite."""
    assert math.sqrt(largest_ratio(0.9, 0.999) or 0.0) == pytest.approx(7.27, abs=0.01)
    assert largest_ratio(0.99, 0.9) is None
    assert largest_ratio(0.9, 1.0) is None


def spoilt(make: Any = Adam) -> tuple[nn.Linear, Any, MomentBound]:
    net, optimizer, bound = made(make)
    net.weight.grad = torch.ones_like(net.weight)
    optimizer.step()
    return net, optimizer, bound


def test_moments_that_begin_out_of_bounds_are_left_alone() -> None:
    """So are those of an optimizer whose betas change, and those of optimizers that keep something else."""
    net, optimizer, bound = spoilt()
    optimizer.state[net.weight]["exp_avg"][0, :4] = 1e6
    bound.exempt(bound.screen(dict(Learner(net, [optimizer]).leaves())))
    assert beyond(net, optimizer, bound) == set()

    net, optimizer, bound = spoilt()
    assert beyond(net, optimizer, bound) == set()
    optimizer.param_groups[0]["betas"] = (0.5, 0.999)
    optimizer.state[net.weight]["exp_avg"][0, :4] = 1e6
    assert beyond(net, optimizer, bound) == set()

    net, optimizer, bound = spoilt()
    OneCycleLR(optimizer, 0.1, total_steps=10)
    optimizer.state[net.weight]["exp_avg"][0, :4] = 1e6
    assert beyond(net, optimizer, bound) == set()

    class Other(Adam):
        """Keeps something else."""

    net, optimizer, bound = spoilt(Other)
    optimizer.state[net.weight]["exp_avg"][0, :4] = 1e6
    assert beyond(net, optimizer, bound) == set()

    net, optimizer, bound = spoilt(partial(SGD, momentum=0.9))
    assert beyond(net, optimizer, bound) == set()


def test_moments_that_somebody_rewrote_are_left_alone() -> None:
    """A second moment that was set to zero says nothing; nor do those that go out of bounds in many elements at once,
    until the last of them is back."""
    net, optimizer, bound = spoilt()
    optimizer.state[net.weight]["exp_avg_sq"][0, :8] = 0.0
    assert beyond(net, optimizer, bound) == set()
    optimizer.state[net.weight]["exp_avg_sq"].zero_()
    assert beyond(net, optimizer, bound) == set()
    sizes = 10.0 ** -torch.linspace(0, 6, 64)
    for _ in range(100):
        net.weight.grad = sizes.reshape(1, -1).clone()
        optimizer.step()
        assert beyond(net, optimizer, bound) == set()


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_run_whose_moments_are_reset_is_left_alone(share: float, tmp_path: Path) -> None:
    """A callback that prunes the second moments, as some methods do, costs no rollback."""

    class Resets(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step in (15, 16, 27):
                for state in trainer.optimizers[0].state.values():
                    second = state["exp_avg_sq"].view(-1)
                    second[: math.ceil(share * len(second))] = 0.0

    guard = NaNGuard(snapshot_every_n_steps=4)
    fit(task("mlp", partial(AdamW, lr=1e-7)), batches(count=60), guard, folder=tmp_path, callbacks=[Resets()])
    assert guard.interventions == []


@pytest.mark.parametrize("count", [18, 40])
def test_a_moment_that_flips_is_found(count: int, tmp_path: Path) -> None:
    """A moment that is suddenly large hides from loss and gradient; it is found with the next snapshot or at the end,
    and named."""

    class Flips(FaultAt):
        def _target(self, trainer: Any, module: Any) -> Any:
            return trainer.optimizers[0].state[module.net[0].weight]["exp_avg"]

    guard = NaNGuard(snapshot_every_n_steps=4)
    make = partial(AdamW, lr=1e-7)
    fit(task("mlp", make), batches(count=count), guard, folder=tmp_path, callbacks=[Flips("moment", 100.0, 16)])
    (found,) = guard.interventions
    assert (found.fault, found.cause) == ("implausible_state", "corrupted_state")
    assert found.place == "optimizer state exp_avg of net.0.weight"
    assert found.remedies[0] == "restore"


def test_a_full_device_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no room to compare moments, a snapshot is taken without."""
    net, optimizer, bound = made()
    for _ in range(2):
        net(torch.ones(1, 64)).sum().backward()
        optimizer.step()
    optimizer.state[net.weight]["exp_avg"][0, 0] = 1e6
    assert beyond(net, optimizer, bound) == {EXP_AVG}

    def full(*args: Any) -> Any:
        raise OutOfMemory("CUDA out of memory")

    monkeypatch.setattr(MomentBound, "_beyond", full)
    assert beyond(net, optimizer, bound) == set()
