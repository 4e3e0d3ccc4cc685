"""Weights with other signs, for a while."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_nanguard.diagnosis.other_weights import other_signs


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
