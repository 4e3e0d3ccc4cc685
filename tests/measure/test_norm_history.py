"""Gradient norms of the newest updates are told by layer."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from lightning_nanguard.guard.meter import Meter
from lightning_nanguard.measure.norm_history import NormHistory
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.thresholds.measurement import MeasurementThresholds


class Experts(nn.Module):
    """Layers of one size, of which a part takes part in each update."""

    def __init__(self, count: int, width: int = 3) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(count))


def measured(module: Experts, uses: list[list[int]], thresholds: MeasurementThresholds | None = None) -> tuple:  # type: ignore[type-arg]
    """What is told after updates in which some of the experts had gradients, and the norms they had."""
    optimizer = SGD(module.parameters(), lr=0.1)
    learner, history = Learner(module, [optimizer]), NormHistory(thresholds)
    meter = Meter(learner, lambda: 1, thresholds=thresholds, history=history)
    norms = []
    for step, used in enumerate(uses, start=1):
        optimizer.zero_grad()
        loss = sum((module.experts[index](torch.randn(2, 3)).square().sum() for index in used), torch.zeros(()))
        loss.backward()
        norms.append({
            f"experts.{index}": math.hypot(*(float(p.grad.norm()) for p in module.experts[index].parameters()))  # type: ignore[union-attr]
            for index in used
        })  # fmt: skip
        meter.see_loss(loss)
        meter.measure_now(step, 0)
    return history.read(learner.named_sizes), norms


def test_the_newest_updates_by_layer() -> None:
    """Weight and bias are one layer; the newest eight updates are kept."""
    (steps, layers), norms = measured(Experts(3), [[0, 1, 2]] * 10)
    assert steps == list(range(3, 11))
    assert layers == {name: pytest.approx([one[name] for one in norms[2:]]) for name in norms[0]}


def test_layers_that_take_no_part() -> None:
    """Where as many layers have gradients but others each time, each norm is told of its own layer."""
    (_, layers), norms = measured(Experts(3), [[0, 1], [1, 2], [0, 2]])
    for name, told in layers.items():
        assert told == [pytest.approx(one[name]) if name in one else None for one in norms]


def test_joined_tensors() -> None:
    """Small tensors that were measured together are told together, large ones by name."""
    thresholds = MeasurementThresholds(fewest_tensors_joined=4, largest_tensor_joined=4, tensors_per_join=2)
    (_, layers), norms = measured(Experts(3), [[0, 1, 2]], thresholds)
    assert set(layers) == {"2 small tensors", "1 small tensors", "experts.0", "experts.1", "experts.2"}
    total = math.hypot(*norms[0].values())
    assert math.hypot(*(value for (value,) in layers.values())) == pytest.approx(total)


def test_parameters_that_are_new() -> None:
    """Where parameters were added since, what cannot be told is not told."""
    module = Experts(2)
    optimizer = SGD(module.experts[0].parameters(), lr=0.1)
    learner, history = Learner(module, [optimizer]), NormHistory()
    history.keep(1, 0, [torch.tensor(1.0), torch.tensor(2.0)])
    optimizer.add_param_group({"params": list(module.experts[1].parameters())})
    assert history.read(learner.named_sizes) == ([1], {})
    assert NormHistory().read(learner.named_sizes) == ([], {})


def test_no_graph_is_kept() -> None:
    """A gradient with a graph (create_graph=True) does not stay in memory."""
    weight = torch.ones(3, requires_grad=True)
    norm = (weight * 2).norm()
    node = weakref.ref(norm)
    history = NormHistory()
    history.keep(1, 0, [norm])
    del norm
    gc.collect()
    assert node() is None
    kept: Tensor = history._newest[0][2][0]
    assert kept.grad_fn is None


def test_it_keeps_at_least_one() -> None:
    """A threshold out of its range is named."""
    with pytest.raises(ValueError, match="updates_with_layer_norms=0"):
        NormHistory(MeasurementThresholds(updates_with_layer_norms=0))
