"""A backward pass followed node by node."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import nn

from lightning_nanguard.diagnosis.gradient_trace import (
    autograd_nodes,
    gradients_by_name,
    origin_of_bad_gradient,
)
from lightning_nanguard.diagnosis.isolation import without_anomaly_checks
from lightning_nanguard.diagnosis.operation_trace import RunningModules


def test_the_node_that_made_the_first_bad_gradient_is_found() -> None:
    """Its forward operation, its line, its module, and the sample; anomaly detection is as before."""
    net = nn.Linear(1, 1, bias=False)
    x = torch.tensor([[0.0], [2.0]])
    with RunningModules(net) as modules, without_anomaly_checks(lines=True):
        loss = net(x).abs().sqrt().sum()
        origin = origin_of_bad_gradient(loss, net, modules, 2)
    assert origin is not None
    assert (origin.operation, origin.backward, origin.samples) == ("sqrt", True, (0,))
    assert origin.line.startswith("test_gradient_trace.py:")
    assert not torch.is_anomaly_enabled()
    assert net.weight.grad is None


def test_a_finite_gradient_has_no_origin() -> None:
    """Nothing is found, and gradients are told by name."""
    net = nn.Linear(1, 1)
    with RunningModules(net) as modules:
        loss = net(torch.ones(2, 1)).sum()
        assert {name: float(one) for name, one in gradients_by_name(net(torch.ones(2, 1)).sum(), net).items()} == {
            "weight": 2.0,
            "bias": 2.0,
        }
        assert "SumBackward0" in [node.name() for node in autograd_nodes(loss.grad_fn)]
        assert origin_of_bad_gradient(loss, net, modules, 2) is None


def test_nothing_keeps_the_graph() -> None:
    """Once the origin is known, module, activations and graph can be freed."""
    net = nn.Linear(1, 1, bias=False)
    module = weakref.ref(net)
    with RunningModules(net) as modules:
        assert origin_of_bad_gradient(net(torch.zeros(2, 1)).abs().sqrt().sum(), net, modules, 2) is not None
    del net, modules
    gc.collect()
    assert module() is None
