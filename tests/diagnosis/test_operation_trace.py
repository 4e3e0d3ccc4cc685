"""A forward pass followed operation by operation."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_nanguard import Origin
from lightning_nanguard.diagnosis.operation_trace import (
    OperationTrace,
    RunningModules,
    bad_samples,
    operand_range,
    storage_key,
)

X = torch.tensor([[1.0], [0.0]])


def traced(step: Callable[[], Tensor], module: nn.Module, labels: dict[int, frozenset[str]]) -> Origin | None:
    with RunningModules(module) as modules:
        with OperationTrace(modules, labels, len(X)) as trace:
            loss = step()
        return trace.origin_of(loss)


class Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.log()


def test_the_first_bad_value_is_found_with_what_it_depends_on() -> None:
    """Operation, module, line, sample and operand; what depends on weights and target is known by storage."""
    net = nn.Sequential(nn.Identity(), Log())
    target = X.clone()
    origin = traced(lambda: (net(target[:, 0].view(2, 1)) + 1).sum(), net, {storage_key(target): frozenset({"target"})})
    assert origin is not None
    assert (origin.operation, origin.module, origin.samples) == ("log", "1", (1,))
    assert origin.line.startswith("test_operation_trace.py:")
    assert (origin.lowest, origin.highest, origin.smallest) == (0.0, 1.0, 0.0)
    assert (origin.from_target, origin.from_weights) == (True, False)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in net.modules())


@pytest.mark.parametrize(
    "step",
    [
        lambda: X.masked_fill(X > 0, -math.inf).sum(),
        lambda: (X.log() * 0 + 1).nan_to_num(1.0).sum(),
        lambda: X.sum(),
    ],
    ids=["put in on purpose", "does not reach the loss", "finite"],
)
def test_what_has_no_origin(step: Callable[[], Tensor]) -> None:
    """A mask of −inf, a value that does not reach the loss, and a finite loss have none."""
    assert traced(step, nn.Identity(), {}) is None


def test_numbers_of_operands() -> None:
    """Range of the finite numbers, whether there is nothing at all, and which samples are bad."""
    assert operand_range(torch.tensor([-2.0, 0.5, math.inf])) == (-2.0, 0.5, 0.5, False)
    assert operand_range(torch.zeros(0)) == (None, None, None, True)
    assert operand_range(-3) == (-3.0, -3.0, 3.0, False)
    assert operand_range("word") == (None, None, None, False)
    assert bad_samples(torch.tensor([1.0, math.nan]), 2) == (1,)
    assert bad_samples(torch.full((2,), math.nan), 2) == ()
    assert bad_samples(torch.tensor([1.0, math.nan]), 3) == ()
