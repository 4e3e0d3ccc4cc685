"""Code that is run again leaves the module as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from lightning_nanguard.diagnosis.isolation import errors_logged, isolated


def test_buffers_and_untrained_parameters_come_back() -> None:
    """Those that are written into, and those that are replaced; also where the code raises."""
    net = nn.BatchNorm1d(2)
    net.average = nn.Parameter(torch.ones(2), requires_grad=False)
    order: list[str] = []

    @contextmanager
    def untraced() -> Iterator[None]:
        order.append("in")
        yield
        order.append("out")

    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with isolated(net, untraced):
        net(torch.randn(8, 2))
        net.average.mul_(3)
        net.running_mean = torch.full((2,), 9.0)
    assert order == ["in", "out"]
    with pytest.raises(RuntimeError, match="size of tensor a"), isolated(net, untraced):
        net.average.mul_(torch.tensor([3.0, 3.0])).add_(torch.ones(7))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_an_error_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    """What could not be found out is in the log for those who look closely, and the run goes on."""
    with caplog.at_level("DEBUG", "lightning_nanguard"), errors_logged("the rows could not be read"):
        raise ValueError("no rows")
    assert caplog.messages == ["NaNGuard: the rows could not be read: ValueError('no rows')"]
    with pytest.raises(KeyboardInterrupt), errors_logged("the rows could not be read"):
        raise KeyboardInterrupt
