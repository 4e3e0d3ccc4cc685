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
        lambda: (X.log() * 0 + 1).nan_to_num(1.0).sum(),
        lambda: X.sum(),
    ],
    ids=["does not reach the loss", "finite"],
)
def test_what_has_no_origin(step: Callable[[], Tensor]) -> None:
    """A value that does not reach the loss, and a finite loss have none."""
    assert traced(step, nn.Identity(), {}) is None


@pytest.mark.parametrize(
    ("step", "operation"),
    [
        (lambda: X.masked_fill(X > -1, -math.inf).logsumexp(1).mean(), "logsumexp"),
        (lambda: torch.where(X > 0, X, torch.tensor(math.nan)).sum(), "where"),
        (lambda: (X * math.nan).reshape(()) if len(X) == 1 else (X.sum() * math.nan), "mul"),
    ],
    ids=["a row that is all masked", "joined with others", "alone"],
)
def test_what_was_put_in_and_came_through(step: Callable[[], Tensor], operation: str) -> None:
    """The operation at which it came together with others, or else the one that it was given to."""
    origin = traced(step, nn.Identity(), {})
    assert origin is not None
    assert (origin.operation, origin.put_in) == (operation, True)


def test_a_mask_that_is_taken_out_again_is_none() -> None:
    """Another operation is named that made a value that is not finite."""
    origin = traced(lambda: X.masked_fill(X > 0, -math.inf).softmax(0).sum() + X.log().sum(), nn.Identity(), {})
    assert origin is not None
    assert (origin.operation, origin.put_in) == ("log", False)


def test_what_a_denominator_was_made_by_and_of() -> None:
    """A deviation, or the count of a mask."""
    of_std = traced(lambda: (X / torch.ones(3).std()).sum(), nn.Identity(), {})
    of_mask = traced(lambda: (X.sum() / (X > 9).sum()).sum(), nn.Identity(), {})
    assert of_std is not None
    assert of_mask is not None
    assert (of_std.made_by, of_std.from_mask) == ("std", False)
    assert (of_mask.made_by, of_mask.from_mask) == ("sum", True)


def test_a_tensor_that_was_bad_before() -> None:
    """The argument that holds NaN or +Inf is named; a mask of −inf from before is meant."""
    scores, labels = torch.zeros(2, 3), torch.tensor([0, 2])
    for value, given in ((math.inf, "weight"), (1.0, "")):
        weight = torch.tensor([1.0, 1.0, value])

        def step(weight: Tensor = weight) -> Tensor:
            return nn.functional.cross_entropy(scores, labels, weight) + X.log().sum()

        origin = traced(step, nn.Identity(), {})
        assert origin is not None
        assert origin.given == given
    scale, ones = torch.tensor([1.0, math.inf]), torch.ones(2, 2)
    origin = traced(lambda: ((ones * scale).relu() @ torch.tensor([[1.0, 1.0], [-1.0, 0.0]])).sum(), nn.Identity(), {})
    assert origin is not None
    assert (origin.operation, origin.given) == ("mul", "other")  # NaN is made of its Inf later
    mask = torch.full((2, 2), -math.inf)
    origin = traced(lambda: (X @ X.T + mask).softmax(1).sum(), nn.Identity(), {})
    assert origin is not None
    assert (origin.operation, origin.given) == ("softmax", "")


def test_numbers_of_operands() -> None:
    """Range of the finite numbers, whether there is nothing at all, and which samples are bad."""
    assert operand_range(torch.tensor([-2.0, 0.5, math.inf])) == (-2.0, 0.5, 0.5, False)
    assert operand_range(torch.zeros(0)) == (None, None, None, True)
    assert operand_range(-3) == (-3.0, -3.0, 3.0, False)
    assert operand_range("word") == (None, None, None, False)
    assert bad_samples(torch.tensor([1.0, math.nan]), 2) == (1,)
    assert bad_samples(torch.full((2,), math.nan), 2) == ()
    assert bad_samples(torch.tensor([1.0, math.nan]), 3) == ()


@pytest.mark.parametrize(
    ("matrix", "highest", "infinite"),
    [(torch.full((1, 4), 3e38), 3e38, False), (torch.tensor([[1.0, 1.0, -math.inf, 3.0]]), 3.0, True)],
    ids=["overflow", "infinite already"],
)
def test_a_linear_layer_is_described_by_its_factors(matrix: Tensor, highest: float, infinite: bool) -> None:
    """The range is that of the larger factor, and not of the bias; an input that was infinite before is no overflow."""
    weight, bias = torch.tensor([[1.0, 2.0, 0.0, 1.0]]), torch.tensor([0.5])
    origin = traced(lambda: torch.nn.functional.linear(matrix, weight, bias).sum(), nn.Identity(), {})
    assert origin is not None
    assert (origin.operation, origin.infinite) == ("addmm", infinite)
    assert origin.highest == pytest.approx(highest)
