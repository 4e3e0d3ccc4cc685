"""The tensors in a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_nanguard.measure.batches import floating_tensors, largest_magnitudes, mapped, nested_tensors


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


BATCH = {"x": [torch.tensor([1.0, -3.0]), (torch.tensor([4]), "text")], "pair": Pair(torch.tensor([3 - 4j]), [None])}


def test_tensors_are_found_in_nested_batches() -> None:
    """Tensors come in the batch's order, floating and complex ones apart, with their largest magnitudes."""
    assert [tensor.dtype for tensor in nested_tensors(BATCH)] == [torch.float32, torch.int64, torch.complex64]
    assert [tensor.dtype for tensor in floating_tensors(BATCH)] == [torch.float32, torch.complex64]
    assert largest_magnitudes([BATCH, torch.zeros(0)]) == [3.0, 4.0]


def test_a_mapped_batch_keeps_its_shape() -> None:
    """Containers and what is no tensor stay as they are, named tuples too."""
    doubled = mapped(BATCH, lambda tensor: 2 * tensor)
    assert doubled["x"][0].tolist() == [2.0, -6.0]
    assert doubled["x"][1][1] == "text"
    assert isinstance(doubled["x"][1], tuple)
    assert isinstance(doubled["pair"], Pair)
    assert doubled["pair"].b == [None]
    assert BATCH["x"][0].tolist() == [1.0, -3.0]  # type: ignore[union-attr]
