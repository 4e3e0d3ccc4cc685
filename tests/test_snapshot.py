"""Norms, finite tensors and readings."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_nanguard.measure.finite import all_finite, batch_finite, suspects
from lightning_nanguard.measure.norms import exact_norm, norms, partial_norms, total_norm
from lightning_nanguard.measure.readings import pend
from lightning_nanguard.measure.tensors import gradients


@given(st.lists(st.floats(-1e10, 1e10, width=32), min_size=1, max_size=20))
def test_the_norm_is_the_norm(values: list[float]) -> None:
    """The norm over several tensors is that of all their elements."""
    tensors = [torch.tensor(values[::2]), torch.tensor(values[1::2])]
    together = torch.tensor(values, dtype=torch.float64)
    assert float(total_norm(partial_norms(tensors))) == pytest.approx(float(together.norm()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_large_is_not_infinite(dtype: torch.dtype) -> None:
    """Values whose sum or square overflows are finite all the same, and one NaN among them is found."""
    tensor = torch.full((64,), 60000.0, dtype=dtype)
    assert all_finite(tensor)
    tensor[3] = math.nan
    assert suspects([torch.ones(2), tensor, torch.ones(0), torch.ones(2, dtype=torch.int64)]) == [1]


def test_a_gradient_that_overflows_its_own_norm_is_confirmed() -> None:
    """A norm that is not finite is looked into: the gradient may be finite."""
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.full((2,), 3e38)
    pending = pend(
        step=0, optimizer_index=0, losses=[torch.tensor(1.0)], loss_factor=1.0, norms=partial_norms(gradients([weight]))
    )
    assert pending is not None
    assert not pending.read().finite
    reading = pending.read(lambda: exact_norm(gradients([weight])))
    assert reading.finite
    assert reading.grad_norm == pytest.approx(3e38 * math.sqrt(2), rel=1e-6)


def test_one_row_of_a_sparse_gradient_is_seen() -> None:
    """A sparse gradient counts with duplicates added up."""
    table = nn.Embedding(10, 2, sparse=True)
    table(torch.tensor([3, 3, 5])).sum().backward()
    (values,) = gradients([table.weight])
    assert float(total_norm(partial_norms([values]))) == pytest.approx(math.sqrt(2 * 4 + 2 * 1))


def test_losses_are_unscaled_and_averaged() -> None:
    """Micro-batch losses become their mean, without the GradScaler's factor."""
    losses = [torch.tensor(8.0), torch.tensor([16.0])]
    pending = pend(step=4, optimizer_index=1, losses=losses, loss_factor=1.0, norms=[], loss_scale=torch.tensor(4.0))
    assert pending is not None
    reading = pending.read()
    assert (reading.loss, reading.grad_norm, reading.loss_scale, reading.stream) == (6.0, None, 4.0, 1)


@pytest.mark.parametrize(
    ("batch", "finite"),
    [
        ({"x": [torch.ones(2), (torch.tensor([1.0, math.nan]),)]}, False),
        ([torch.ones(2), torch.ones(2, dtype=torch.int64)], True),
        ((torch.ones(2, dtype=torch.int64), "text"), None),
    ],
)
def test_nested_batches(batch: object, finite: bool | None) -> None:
    """Floating tensors anywhere in a batch are looked at; a batch without any says nothing."""
    assert batch_finite(batch) is finite


@pytest.mark.parametrize("order", [2.0, math.inf])
def test_norms_of_sparse_state(order: float) -> None:
    """Of a sparse tensor, such as the momentum of an embedding, what it stores counts, and an empty one is 0."""
    stored = torch.sparse_coo_tensor(
        torch.tensor([[1, 1]]), torch.tensor([[3.0], [4.0]]), (5, 1), check_invariants=True
    )
    empty = torch.sparse_coo_tensor(
        torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, 1), (5, 1), check_invariants=True
    )
    assert norms([stored, empty, torch.tensor([-2.0])], order) == [7.0, 0.0, 2.0]
