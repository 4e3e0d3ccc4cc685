"""Norms of many tensors: fast, exact and safe ones."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_nanguard.measure.norms import (
    double_norm,
    each_norm,
    exact_norm,
    norms,
    partial_norms,
    safe_norm,
    safe_total_norm,
    total_norm,
)
from lightning_nanguard.measure.tensors import gradients
from lightning_nanguard.thresholds.measurement import MeasurementThresholds

CPU = torch.device("cpu")


@given(st.lists(st.floats(-1e10, 1e10, width=32), min_size=1, max_size=20))
def test_the_norm_is_the_norm(values: list[float]) -> None:
    """The norm over several tensors is that of all their elements, by whatever way it is taken."""
    tensors = [torch.tensor(values[::2]), torch.tensor(values[1::2])]
    expected = pytest.approx(float(torch.tensor(values, dtype=torch.float64).norm()), rel=1e-5)
    assert float(total_norm(partial_norms(tensors))) == expected
    assert exact_norm(tensors) == expected
    assert float(safe_total_norm([safe_norm(one) for one in tensors if len(one)], CPU)) == expected
    assert math.hypot(*norms(tensors)) == expected


@pytest.mark.parametrize("joined", [False, True])
def test_small_tensors_are_joined_from_a_number_on(joined: bool) -> None:
    """Joining small tensors changes how many norms there are, and not the norm over all of them."""
    tensors = [torch.full((size,), 2.0) for size in (3, 4, 5, 100)]
    thresholds = replace(
        MeasurementThresholds(), fewest_tensors_joined=4 if joined else 5, largest_tensor_joined=4, tensors_per_join=1
    )
    assert len(partial_norms(tensors, thresholds)) == 4
    together = partial_norms(tensors, replace(thresholds, tensors_per_join=10))
    assert len(together) == (3 if joined else 4)
    assert float(total_norm(together)) == pytest.approx(2 * math.sqrt(112))


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float16, torch.float64), (torch.bfloat16,)])
def test_half_precision_does_not_overflow(dtypes: tuple[torch.dtype, ...]) -> None:
    """A norm past the largest half-precision number is taken in float32, beside other dtypes and alone."""
    tensors = [torch.full((16,), 3e4, dtype=dtype) for dtype in dtypes]
    expected = pytest.approx(float(tensors[0][0]) * 4 * math.sqrt(len(dtypes)), rel=1e-3)
    assert float(total_norm(partial_norms(tensors))) == expected
    assert [float(norm) for norm in each_norm(tensors[:1])] == norms(tensors[:1])


def test_a_norm_keeps_no_graph() -> None:
    """The norm of gradients that keep their graph keeps none."""
    weight = torch.ones(2, requires_grad=True)
    assert not total_norm(partial_norms([weight * 3])).requires_grad


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


def test_one_row_of_a_sparse_gradient_is_seen() -> None:
    """A sparse gradient counts with duplicates added up."""
    table = nn.Embedding(10, 2, sparse=True)
    table(torch.tensor([3, 3, 5])).sum().backward()
    (values,) = gradients([table.weight])
    assert float(total_norm(partial_norms([values]))) == pytest.approx(math.sqrt(2 * 4 + 2 * 1))


def test_squares_that_overflow_their_own_precision() -> None:
    """Where the fast norm overflows, the exact and the safe one are finite; a NaN is not."""
    large = torch.full((2,), 3e38)
    assert math.isinf(float(total_norm(partial_norms([large]))))
    assert exact_norm([large]) == double_norm(large) == pytest.approx(3e38 * math.sqrt(2), rel=1e-6)
    assert float(safe_norm(large)) == pytest.approx(3e38 * math.sqrt(2), rel=1e-6)
    # The result is float32, whose largest number stands for all beyond it.
    assert float(safe_total_norm([safe_norm(large)], CPU)) == torch.finfo(torch.float32).max
    assert math.isnan(exact_norm([large, torch.tensor([math.nan])]))


@pytest.mark.parametrize(
    ("values", "finite"),
    [
        (torch.full((100,), 1e300, dtype=torch.float64), True),
        (torch.zeros(3, dtype=torch.float64), True),
        (torch.tensor([1.0, math.inf], dtype=torch.float64), False),
        (torch.tensor([1.0, math.nan]), False),
        (torch.full((4,), 60000.0, dtype=torch.float16), True),
    ],
)
def test_a_safe_norm_is_finite_when_its_elements_are(values: Tensor, finite: bool) -> None:
    """No square overflows on the way, in float64 either."""
    norm = float(safe_norm(values))
    assert math.isfinite(norm) is finite
    if finite:
        largest = float(values.abs().max())
        assert norm == pytest.approx(largest * math.sqrt(len(values)), rel=1e-6)
