"""The multiplier on the learning rate, without a Trainer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim import lr_scheduler as schedulers

from lightning_nanguard.act.learning_rate import LearningRate
from tests.act.rates import (
    EPOCHS,
    GROUP_RATES,
    MULTIPLIERS,
    PLAN,
    SCHEDULERS,
    Tiny,
    data,
    plain,
    taken,
)


def one_group(lr: Any, **options: Any) -> tuple[Optimizer, LearningRate]:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer = SGD([{"params": [parameter], "lr": lr}], lr=1.0, **options)
    return optimizer, LearningRate([optimizer])


@pytest.mark.parametrize("lr", [0.1, 0.0, float("inf"), float("nan"), torch.tensor(float("inf"))])
def test_the_ratio_is_a_multiplier(lr: Any) -> None:
    """Whatever the rate is, the ratio can be set as a multiplier again."""
    optimizer, rate = one_group(0.1)
    rate.set_multiplier(0.5)
    optimizer.param_groups[0]["lr"] = lr
    rate.set_multiplier(rate.ratio())
    assert rate.ratio() == pytest.approx(0.5)


def test_effective_is_never_counted_twice() -> None:
    """effective() and scheduled() say the same whether the rates are applied or not."""
    _, rate = one_group(0.1)
    rate.set_multiplier(0.5)
    for change in (rate.apply, rate.apply, rate.withdraw, rate.withdraw, rate.apply):
        change()
        assert rate.effective() == [0.05]
        assert rate.scheduled() == [0.1]


def test_change_while_applied() -> None:
    """A multiplier that is set while scaled rates are written takes effect at once, and 1.0 puts back the object."""
    original = float("0.1")
    optimizer, rate = one_group(original)
    group = optimizer.param_groups[0]
    rate.set_multiplier(0.5)
    assert group["lr"] is original
    rate.apply()
    assert group["lr"] == 0.05
    rate.set_multiplier(0.3)
    assert group["lr"] == 0.1 * 0.3
    rate.set_multiplier(1.0)
    assert group["lr"] is original


def test_set_by_somebody_else() -> None:
    """A rate set while scaled ones are written is a new scheduled rate, even if it equals the scaled one."""
    optimizer, rate = one_group(0.1)
    rate.set_multiplier(0.5)
    rate.apply()
    optimizer.param_groups[0]["lr"] = float("0.05")
    assert rate.scheduled() == [0.05]
    rate.apply()
    assert optimizer.param_groups[0]["lr"] == 0.025
    rate.withdraw()
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_set_by_somebody_else_is_kept() -> None:
    """What somebody sets while scaled rates are written is not overwritten when they are put back."""
    optimizer, rate = one_group(0.1)
    rate.set_multiplier(0.5)
    rate.apply()
    optimizer.param_groups[0]["lr"] = 0.2
    rate.withdraw()
    assert optimizer.param_groups[0]["lr"] == 0.2


@pytest.mark.parametrize("positional", [False, True], ids=["keyword", "positional"])
def test_closure_sees_the_scheduled_rate(positional: bool, used: list[float]) -> None:
    """A closure sees the scheduled rate, may change the multiplier for its own update, and returns what it returned."""
    optimizer, rate = one_group(0.1)
    rate.attach()
    rate.set_multiplier(0.5)
    seen: list[float] = []

    def closure() -> str:
        seen.append(optimizer.param_groups[0]["lr"])
        rate.set_multiplier(0.25)
        return "loss"

    result = optimizer.step(closure) if positional else optimizer.step(closure=closure)
    assert (result, seen, used) == ("loss", [0.1], [0.025])
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in ("none", "plateau")])
def test_tensor_rates(name: str, used: list[float]) -> None:
    """Tensor rates are scaled in place: the group keeps its tensor, and the scheduler notices nothing."""

    def run(guarded: bool) -> tuple[list[float], Any, list[float]]:
        module = Tiny()
        rates = [torch.tensor(value) for value in GROUP_RATES]
        groups = [{**group, "lr": lr} for group, lr in zip(module.groups(), rates, strict=True)]
        optimizer = SGD(groups, lr=torch.tensor(1.0), foreach=False)
        scheduler = SCHEDULERS[name](optimizer)
        rate = LearningRate([optimizer])
        rate.attach()
        for step, batch in enumerate(data() * EPOCHS):
            if guarded and step in PLAN:
                rate.set_multiplier(PLAN[step])
            optimizer.zero_grad()
            module.loss(batch).backward()
            optimizer.step()
            scheduler.step()
        assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, rates, strict=True))
        return taken(used), plain(scheduler.state_dict()), [lr.item() for lr in rates]

    bare_used, bare_state, bare_rates = run(guarded=False)
    guarded_used, state, rates = run(guarded=True)
    expected = [
        (torch.tensor(value) * multiplier).item()
        for value, multiplier in zip(bare_used, [m for m in MULTIPLIERS for _ in range(2)], strict=True)
    ]
    assert guarded_used == expected
    assert (state, rates) == (bare_state, bare_rates)


def test_tensor_rate_shared_by_groups() -> None:
    """One tensor that is the rate of several groups is scaled once."""
    lr = torch.tensor(0.5)
    groups = [{"params": [nn.Parameter(torch.ones(1))]}, {"params": [nn.Parameter(torch.ones(1))]}]
    rate = LearningRate([SGD(groups, lr=lr, foreach=False)])
    rate.set_multiplier(0.5)
    rate.apply()
    assert lr.item() == 0.25
    assert (rate.effective(), rate.scheduled()) == ([0.25, 0.25], [0.5, 0.5])
    lr.fill_(0.25)  # by somebody else, who happens to choose the value we wrote
    assert rate.scheduled() == [0.25, 0.25]
    rate.withdraw()
    assert lr.item() == 0.25


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize(
    ("scheduled", "effective"), [(1.0, 0.25), (0.25, 0.125), (0.125, 0.125), (0.0625, 0.0625), (0.0, 0.0)]
)
def test_min_lr(scheduled: float, effective: float, as_tensor: bool) -> None:
    """min_lr is a floor of the effective rate, and never lifts it above the scheduled one."""
    optimizer, rate = one_group(torch.tensor(scheduled) if as_tensor else scheduled, foreach=False)
    rate.set_multiplier(0.25, min_lr=0.125)
    assert rate.effective() == [effective]
    rate.apply()
    assert optimizer.param_groups[0]["lr"] == effective
    rate.withdraw()
    assert optimizer.param_groups[0]["lr"] == scheduled


def test_attach_and_detach(used: list[float]) -> None:
    """Attaching twice scales once; detaching takes the scale and the hooks away, and attaching again brings it back."""
    optimizer, rate = one_group(0.1)
    rate.attach()
    rate.attach()
    rate.set_multiplier(0.5)
    optimizer.step()
    rate.apply()
    rate.detach()
    rate.detach()
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    optimizer.step()
    rate.attach()
    optimizer.step()
    assert used == [0.05, 0.1, 0.05]


def test_state_dict_round_trip(tmp_path: Path) -> None:
    """The state is plain, survives torch.save with weights_only, and brings back multiplier and floor."""
    _, rate = one_group(0.1)
    rate.set_multiplier(0.25, min_lr=0.01)
    torch.save(rate.state_dict(), tmp_path / "state.pt")
    _, other = one_group(0.1)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (other.multiplier, other.min_lr, other.effective()) == (0.25, 0.01, [0.025])


def test_group_without_a_rate() -> None:
    """A group whose rate is None, as in optimizers that compute their own, is left out."""
    optimizer, rate = one_group(0.1)
    optimizer.param_groups.append({"params": [], "lr": None})
    rate.set_multiplier(0.5)
    rate.apply()
    assert rate.effective() == [0.05]
    assert optimizer.param_groups[1]["lr"] is None


def test_no_scheduler_warning(used: list[float]) -> None:
    """torch's own check of the order of optimizer and scheduler steps keeps working with the hooks in place."""
    optimizer, rate = one_group(0.1)
    rate.attach()
    rate.set_multiplier(0.5)
    scheduler = schedulers.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()
    optimizer.step()
    assert used == [0.05, 0.025]
    assert set(scheduler.state_dict()) == set(schedulers.ExponentialLR(one_group(0.1)[0], 0.5).state_dict())


@pytest.mark.parametrize(
    "given",
    [{"value": value} for value in (0, -0.5, float("nan"), float("inf"))]
    + [{"value": 0.5, "min_lr": low} for low in (-1e-9, float("nan"), float("inf"))]
    + [{"value": 0.5, "max_lr": high} for high in (0.0, float("nan"))],
)
def test_numbers_out_of_range(given: dict[str, float]) -> None:
    """A multiplier that is not positive and finite is refused, and so are limits that no rate can be within."""
    _, rate = one_group(0.1)
    with pytest.raises(ValueError, match=r"out of range"):
        rate.set_multiplier(**given)
    with pytest.raises(ValueError, match=r"out of range"):
        rate.load_state_dict({"multiplier": given["value"], "min_lr": 0.0, **given})
    assert rate.multiplier == 1.0


def test_imports_no_lightning() -> None:
    """learning_rate needs torch alone."""
    home = "lightning_nanguard.act.learning_rate"
    code = f"import sys, {home}; print([m for m in sys.modules if 'pytorch_lightning' in m])"
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
