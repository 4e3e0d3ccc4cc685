"""Whether tensors and batches are finite."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_nanguard.measure.finite import (
    all_finite,
    bad_unless_masked,
    batch_finite,
    non_finite_fields,
    non_finite_indices,
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_large_is_not_infinite(dtype: torch.dtype) -> None:
    """Values whose sum or square overflows are finite all the same, and one NaN among them is found."""
    tensor = torch.full((64,), 60000.0, dtype=dtype)
    assert all_finite(tensor)
    assert all_finite(torch.full((64,), torch.finfo(dtype).max, dtype=dtype))
    tensor[3] = math.nan
    assert non_finite_indices([torch.ones(2), tensor, torch.ones(0), torch.ones(2, dtype=torch.int64)]) == [1]


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


def test_fields_that_are_not_finite() -> None:
    """Fields are named by their paths; one bad batch is enough."""
    bad = torch.tensor([1.0, math.nan])
    assert non_finite_fields([{"x": bad, "y": [torch.ones(2), bad]}, {"x": torch.ones(2), "z": -bad}]) == {
        "x",
        "y.1",
        "z",
    }
    assert non_finite_fields([]) == non_finite_fields([(torch.ones(2, dtype=torch.int64), "text")]) == frozenset()


def test_a_mask_is_not_bad() -> None:
    """NaN and +Inf are bad; −Inf is not, and integers never are."""
    numbers = (0.0, -math.inf, math.inf, math.nan)
    assert [bad_unless_masked(torch.tensor([1.0, number])) for number in numbers] == [False, False, True, True]
    assert not bad_unless_masked(torch.ones(2, dtype=torch.int64))
