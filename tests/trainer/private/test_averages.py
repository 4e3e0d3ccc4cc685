"""Averaged copies that callbacks keep."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning.callbacks as stock
import torch
from pytorch_lightning import Callback
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_nanguard.thresholds.checkpoints import CheckpointsThresholds
from lightning_nanguard.trainer.private.averages import averaged_copies, swaps_weights


class Keeps(Callback):
    def __init__(self, value: Any) -> None:
        self.kept = value


class Holder:
    def __init__(self, *callbacks: Callback) -> None:
        self.callbacks = callbacks


def module() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1), nn.Sequential(nn.Linear(1, 1).requires_grad_(False)))


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


NET = module()


@pytest.mark.parametrize(
    ("value", "counts"),
    [
        (copies(NET), True),
        ({f"module.{name}": tensor for name, tensor in copies(NET).items()}, True),
        (torch.optim.swa_utils.AveragedModel(NET), True),
        (list(copies(NET).values()), True),
        (list(copies(NET[:2]).values()), True),
        (copies(NET[0]), True),
        (copies(NET[1]), False),
        (NET, False),
        (dict(NET.named_parameters()), False),
        (MeanMetric(), False),
        ([torch.ones(3)], False),
        ({"loss": 1.0}, False),
        (["text"], False),
        (None, False),
    ],
)
def test_what_counts_as_a_copy(value: Any, counts: bool) -> None:
    """A module, dictionary or list with the shapes of the module, or of a part that holds half of what is trained; not
    the live module under another name, and nothing else."""
    found = averaged_copies(Holder(Callback(), Keeps(value)), NET)
    assert list(found) == (["Keeps.kept (1)"] if counts else [])


def test_how_large_a_part_must_be() -> None:
    """The share of what is trained that a copy must cover is a threshold."""
    holder = Holder(Keeps(copies(NET[1])))
    assert averaged_copies(holder, NET, CheckpointsThresholds(averaged_copy_share=0.2)) != {}


def test_lazy_parameters_count_once_they_are_made() -> None:
    """Before the first forward a lazy layer has no shapes that a copy could have."""
    net = nn.Sequential(nn.Linear(1, 1), nn.LazyLinear(2))
    holder = Holder(Keeps(copies(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 2)))))
    assert averaged_copies(holder, net) != {}  # of what there is
    net(torch.ones(1, 1))
    assert averaged_copies(holder, net) != {}


@pytest.mark.skipif(not hasattr(stock, "WeightAveraging"), reason="this Lightning has no WeightAveraging")
def test_who_swaps_weights() -> None:
    """WeightAveraging validates its average in the weights' place; other callbacks do not."""
    assert swaps_weights(Holder(Callback(), stock.WeightAveraging()))
    assert not swaps_weights(Holder(Callback()))
