"""The parameters and buffers of a module are read, set, and given other signs for a while."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_nanguard.diagnosis.module_state import other_signs, put_into, state_of
from tests.helpers import same_bits


def test_a_state_is_put_back_bitwise() -> None:
    """Parameters and buffers, also those that are not persistent; lazy ones are left out."""
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.LazyLinear(1))
    net.register_buffer("count", torch.tensor(3), persistent=False)
    state = {name: tensor.clone() for name, tensor in state_of(net).items()}
    assert {"0.weight", "1.running_var", "count"} <= set(state)
    assert not any(name.startswith("2.") for name in state)
    with torch.no_grad():
        for tensor in state_of(net).values():
            tensor.zero_()
    put_into(net, state)
    assert same_bits(state_of(net), state)


def test_another_module_is_refused() -> None:
    """The error names the first tensor that does not fit, with both shapes."""
    with pytest.raises(
        ValueError, match=r"Linear: weight is \(2, 3\) in the incident and \(2, 4\) in the module \(1 such\)"
    ):
        put_into(nn.Linear(4, 2), state_of(nn.Linear(3, 2)))


def test_signs_change_and_come_back() -> None:
    """Sizes stay, draws differ, frozen parameters are left alone, and no autograd graph notices."""
    net = nn.Sequential(nn.Linear(3, 16), nn.Linear(16, 1)).requires_grad_(True)
    net[1].bias.requires_grad_(False)
    before = [p.detach().clone() for p in net.parameters()]
    versions = [p._version for p in net.parameters()]
    loss = net(torch.ones(2, 3)).sum()
    seen = []
    for draw in (0, 1):
        with other_signs(net, draw):
            seen.append(net[0].weight.detach().clone())
            assert all(torch.equal(p.abs(), one.abs()) for p, one in zip(net.parameters(), before, strict=True))
            assert torch.equal(net[1].bias, before[3])
    assert not torch.equal(seen[0], seen[1])
    with pytest.raises(RuntimeError, match="within"), other_signs(net, 0):
        raise RuntimeError("within")
    assert all(torch.equal(p, one) for p, one in zip(net.parameters(), before, strict=True))
    assert [p._version for p in net.parameters()] == versions
    loss.backward()
