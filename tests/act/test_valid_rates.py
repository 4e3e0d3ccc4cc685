"""Learning rates that are none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Optimizer

from lightning_nanguard.act.learning_rate import LearningRate
from lightning_nanguard.act.valid_rates import InvalidRate, ValidRates, words_for


def groups(*rates: Any) -> Optimizer:
    return SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates], foreach=False)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1])
@pytest.mark.parametrize("tensor", [False, True])
def test_the_last_valid_rate_is_known_for_each_group(bad: float, tensor: bool) -> None:
    """Of each group the last rate counts that was one; a valid rate, 0 too, is left alone."""
    made = (lambda rate: torch.tensor(rate)) if tensor else float
    optimizer, rates = groups(made(0.5), made(0.25)), ValidRates()
    first, second = optimizer.param_groups
    rates.look(optimizer)
    assert not rates.any()
    first["lr"], second["lr"] = made(bad), made(0.0)
    rates.look(optimizer)
    (invalid,) = rates.invalid(optimizer)
    assert (invalid.group, invalid.valid) == (0, 0.5)
    assert rates.instead_of(first, first["lr"]) == 0.5
    assert rates.instead_of(second, second["lr"]) is second["lr"]
    first["lr"] = made(0.125)
    rates.look(optimizer)
    assert rates.invalid(optimizer) == []
    assert not rates.any()


def test_a_group_that_never_had_a_rate() -> None:
    """There is nothing to use in its place."""
    optimizer, rates = groups(0.5), ValidRates()
    optimizer.param_groups[0]["lr"] = math.nan
    rates.look(optimizer)
    assert rates.invalid(optimizer)[0].valid is None
    assert math.isnan(rates.instead_of(optimizer.param_groups[0], math.nan))


def test_what_is_said_of_them() -> None:
    """Group, scheduler, rate, and what is used."""
    assert list(words_for([InvalidRate(1, -0.5, 0.25), InvalidRate(2, math.nan, None)], "LambdaLR")) == [
        "the learning rate of group 1, set by LambdaLR, is -0.5; the last valid rate, 0.25, is used",
        "the learning rate of group 2, set by LambdaLR, is nan; the update is skipped",
    ]
    assert "set by" not in next(words_for([InvalidRate(0, math.inf, 1.0)], ""))


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
