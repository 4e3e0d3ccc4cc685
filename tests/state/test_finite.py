"""Which tensors of a learner are not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_nanguard.state.device import OutOfMemory
from lightning_nanguard.state.finite import FiniteCheck, allowances
from lightning_nanguard.state.learner import Learner
from tests.state.nets import Net, made, train


def test_a_mask_is_no_poison() -> None:
    """What was not finite at the start is allowed, and only there."""
    net, _, learner = made("sgd")
    check = FiniteCheck()
    check.begin(learner)
    assert check.corrupt(learner.leaves()) is None
    net.mask[1] = 0.0
    assert check.corrupt(learner.leaves()) is None
    net.norm.running_var[2] = math.nan
    assert check.corrupt(learner.leaves()) == "buffer norm.running_var"
    assert set(check.allowed) == set(allowances(learner.weights())) - {("buffer", "norm.running_var")}
    net.norm.running_var[2] = -1.0
    assert check.corrupt(learner.leaves()) == "the root of buffer norm.running_var"


def test_optimizer_state_is_named() -> None:
    """A moment that is not finite is found, and so is a tensor in a list."""
    for name, key in (("adam", "exp_avg_sq"), ("lbfgs", "old_dirs")):
        net, optimizer, learner = made(name)
        check = FiniteCheck()
        check.begin(learner)
        train(net, optimizer, 2, seed=1)
        value = optimizer.state[net.first.weight][key]
        (value[0] if isinstance(value, list) else value).view(-1)[0] = math.inf
        assert check.corrupt(learner.leaves()) == f"optimizer state {key} of first.weight"


def test_squares_that_overflow() -> None:
    """Where squares of gradients overflow, infinite second moments are no fault, and their size says nothing."""
    net, optimizer, learner = made("adam")
    check = FiniteCheck()
    check.begin(learner)
    train(net, optimizer, 2, seed=1)
    moments = optimizer.state[net.first.weight]
    moments["exp_avg_sq"].view(-1)[0] = math.inf
    check.squares_overflow = True
    assert check.corrupt(learner.leaves()) is None
    leaves = dict(learner.leaves())
    assert {*leaves} - {*check.sized(leaves)} == {key for key in leaves if key[-1].endswith("exp_avg_sq")}
    for name, value in (("exp_avg_sq", math.nan), ("exp_avg_sq", -math.inf), ("exp_avg", math.inf)):
        moments[name].view(-1)[0] = value
        assert check.corrupt(learner.leaves()) == f"optimizer state {name} of first.weight"
        moments[name].view(-1)[0] = 1.0


def test_a_buffer_made_since_is_left_alone() -> None:
    """Nothing says what a buffer should hold that was made or resized after the start."""
    net, _, learner = made("sgd")
    check = FiniteCheck()
    check.begin(learner)
    net.register_buffer("late", torch.full((2,), -math.inf))
    net.mask = torch.full((6,), math.nan)
    assert check.corrupt(learner.leaves()) is None


def test_an_averaged_copy_may_hold_the_masks() -> None:
    """What is allowed in a buffer is allowed in its averaged copy, which may appear in mid-run."""
    net = Net()
    copies: dict[str, dict[str, torch.Tensor]] = {}
    learner = Learner(net, [], averages=lambda: copies)
    check = FiniteCheck()
    check.begin(learner)
    copies["EMA"] = {"module.mask": net.mask.clone()}
    assert check.corrupt(learner.leaves()) is None
    copies["EMA"]["module.last.bias"] = torch.tensor([math.nan])
    assert check.corrupt(learner.leaves()) == "module.last.bias in the averaged copy of EMA"


def test_what_must_be_finite_is_zero_where_it_need_not_be() -> None:
    """The tensors given for a norm are the live ones. Allowed elements are zero, and the module's own buffers are left
    out."""
    net, _, learner = made("sgd")
    net.last.weight.data[0, 0] = -math.inf
    check = FiniteCheck()
    check.begin(learner)
    given = dict(check.to_be_finite(learner.leaves()))
    assert given["parameter", "first.weight"] is net.first.weight
    assert not given["parameter", "last.weight"][0, 0]
    assert torch.isinf(net.last.weight[0, 0])
    assert ("buffer", "mask") not in given


def test_a_tensor_that_a_full_device_cannot_look_at_is_looked_at_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad state on a full device is named all the same."""
    net, _, learner = made("sgd")
    check, real, calls = FiniteCheck(), FiniteCheck._is_corrupt, []
    check.begin(learner)

    def full_at_first(self: FiniteCheck, key: Any, values: Any) -> bool:
        calls.append(key)
        if len(calls) == 1:
            raise OutOfMemory("CUDA out of memory")
        return real(self, key, values)

    monkeypatch.setattr(FiniteCheck, "_is_corrupt", full_at_first)
    net.last.weight.data[0, 0] = math.nan
    assert check.corrupt(learner.leaves()) == "parameter last.weight"
    assert len(calls) == 2
