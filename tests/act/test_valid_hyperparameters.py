"""Learning rates and other hyperparameters that are none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam, Optimizer

from lightning_nanguard.act.learning_rate import LearningRate
from lightning_nanguard.act.valid_hyperparameters import InvalidHyperparameter, ValidHyperparameters, words_for


def groups(*rates: Any) -> Optimizer:
    return SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates], foreach=False)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1, 1e39])
@pytest.mark.parametrize("tensor", [False, True])
def test_the_last_valid_rate_is_known_for_each_group(bad: float, tensor: bool) -> None:
    """Of each group the last rate counts that was one; a valid rate, 0 too, is left alone."""
    made = (lambda rate: torch.tensor(rate)) if tensor else float
    optimizer, rates = groups(made(0.5), made(0.25)), ValidHyperparameters()
    first, second = optimizer.param_groups
    rates.look(optimizer)
    assert not rates.any()
    first["lr"], second["lr"] = made(bad), made(0.0)
    rates.look(optimizer)
    (invalid,) = rates.invalid(optimizer)
    assert (invalid.group, invalid.valid) == (0, 0.5)
    assert rates.rate(first, first["lr"]) == 0.5
    assert rates.rate(second, second["lr"]) is second["lr"]
    first["lr"] = made(0.125)
    rates.look(optimizer)
    assert rates.invalid(optimizer) == []
    assert not rates.any()


def test_a_group_that_never_had_a_rate() -> None:
    """There is nothing to use in its place."""
    optimizer, rates = groups(0.5), ValidHyperparameters()
    optimizer.param_groups[0]["lr"] = math.nan
    rates.look(optimizer)
    assert rates.invalid(optimizer)[0].valid is None
    assert math.isnan(rates.rate(optimizer.param_groups[0], math.nan))


def test_what_is_said_of_them() -> None:
    """Group, scheduler, rate, and what is used."""
    assert list(
        words_for(
            [InvalidHyperparameter(1, "lr", -0.5, 0.25), InvalidHyperparameter(2, "lr", math.nan, None)], "LambdaLR"
        )
    ) == [
        "the learning rate of group 1, set by LambdaLR, is -0.5; the last valid rate, 0.25, is used",
        "the learning rate of group 2, set by LambdaLR, is nan; the update is skipped",
    ]
    assert "set by" not in next(words_for([InvalidHyperparameter(0, "lr", math.inf, 1.0)], ""))


@pytest.mark.parametrize("multiplier", [1.0, 0.5])
@pytest.mark.parametrize("kind", [SGD, LBFGS])
def test_the_step_is_made_at_the_last_valid_rate(kind: Any, multiplier: float) -> None:
    """Scaled by the multiplier; the group keeps what its schedule says, and the rates that are read are valid."""
    weight = nn.Parameter(torch.ones(1))
    optimizer = kind([weight], lr=0.5)
    rate = LearningRate([optimizer])
    rate.attach()
    rate.set_multiplier(multiplier)
    seen: list[float] = []

    def closure() -> float:
        seen.append(optimizer.param_groups[0]["lr"])
        weight.grad = torch.ones(1)
        return 1.0

    optimizer.step(closure)
    moved = float(weight.detach())
    with torch.no_grad():
        weight.fill_(1.0)
    optimizer.state.clear()
    optimizer.param_groups[0]["lr"] = math.nan
    optimizer.step(closure)
    assert float(weight.detach()) == moved
    assert math.isnan(optimizer.param_groups[0]["lr"])
    assert math.isnan(seen[-1]), "the closure sees the scheduled rate"
    assert rate.effective() == [0.5 * multiplier]
    assert rate.first() == 0.5 * multiplier
    assert rate.ratio() == multiplier
    rate.set_multiplier(multiplier, max_lr=rate.effective()[0] / 2)
    assert rate.effective() == [0.25 * multiplier]


@pytest.mark.parametrize(
    ("key", "bad"), [("weight_decay", math.inf), ("momentum", math.nan), ("betas", (0.9, math.nan)), ("eps", math.nan)]
)
def test_other_hyperparameters_are_replaced_in_the_step_only(key: str, bad: Any) -> None:
    """The step uses the last valid value, its closure and everybody after it read the one that was set."""
    weight = nn.Parameter(torch.ones(1))
    optimizer: Optimizer = Adam([weight], lr=0.1, eps=1e-3)
    if key == "momentum":
        optimizer = SGD([weight], lr=0.1, momentum=0.5)
    rate = LearningRate([optimizer])
    rate.attach()
    seen: list[Any] = []

    def closure() -> float:
        seen.append(optimizer.param_groups[0][key])
        weight.grad = torch.ones(1)
        return 1.0

    optimizer.step(closure)
    valid, optimizer.param_groups[0][key] = optimizer.param_groups[0][key], bad
    optimizer.step(closure)
    assert seen == [valid, bad]
    assert optimizer.param_groups[0][key] is bad
    assert bool(torch.isfinite(weight).all())
    (found,) = rate.valid.invalid(optimizer)
    assert (found.key, found.valid) == (key, valid)
    assert not math.isfinite(found.number)
    assert next(words_for([found], "OneCycleLR")).startswith(f"the {key} of group 0 is ")
    optimizer.param_groups[0][key] = valid
    optimizer.step(closure)
    assert not rate.valid.any()


def test_infinity_that_may_be_meant_is_left_alone() -> None:
    """A limit of an optimizer's own may be Inf, which turns it off."""
    optimizer, valid = groups(0.5), ValidHyperparameters()
    optimizer.param_groups[0]["clip"] = math.inf
    valid.look(optimizer)
    assert not valid.any()


def test_the_values_of_another_process() -> None:
    """They replace only invalid values, and the first list that has a value counts."""
    optimizer, valid = groups(0.5), ValidHyperparameters()
    optimizer.param_groups[0]["betas"] = (0.9, 0.99)
    valid.look(optimizer)
    before = valid.used(optimizer)
    optimizer.param_groups[0].update(lr=math.nan, betas=(math.nan, 0.99), weight_decay=0.1)
    valid.look(optimizer)
    assert "lr" not in valid.present(optimizer)[0]
    valid.use(optimizer, [[{}], [{"lr": 0.25, "betas": [0.8, 0.99], "weight_decay": 1.0}], before])
    assert valid.rate(optimizer.param_groups[0], math.nan) == 0.25
    assert {key: value for _, key, value in valid.others(optimizer)} == {"betas": (0.8, 0.99)}
    assert valid.used(optimizer)[0]["weight_decay"] == 0.1
