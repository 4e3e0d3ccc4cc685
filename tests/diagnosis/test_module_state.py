"""The state of a module, taken out and put back by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_nanguard.diagnosis.module_state import put_into, state_of
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
