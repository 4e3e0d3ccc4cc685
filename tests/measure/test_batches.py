"""The tensors in a batch of any kind."""

from __future__ import annotations

from array import array
from collections import UserDict
from sys import getsizeof
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_nanguard.measure import batches as measured
from lightning_nanguard.measure import containers
from lightning_nanguard.measure.batches import (
    bytes_of,
    floating_tensors,
    largest_magnitudes,
    mapped,
    named_tensors,
    nested_tensors,
)
from tests.batches import KINDS, Graph, Pair, packed, tensors_of

BATCH = {"x": [torch.tensor([1.0, -3.0]), (torch.tensor([4]), "text")], "pair": Pair(torch.tensor([3 - 4j]), [None])}  # type: ignore[arg-type]


def test_tensors_are_found_in_nested_batches() -> None:
    """Tensors come in the batch's order, floating and complex ones apart, with their largest magnitudes."""
    assert [tensor.dtype for tensor in nested_tensors(BATCH)] == [torch.float32, torch.int64, torch.complex64]
    assert [tensor.dtype for tensor in floating_tensors(BATCH)] == [torch.float32, torch.complex64]
    assert largest_magnitudes([BATCH, torch.zeros(0)]) == [3.0, 4.0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_batch_is_looked_into_and_mapped(kind: str) -> None:
    """Its tensors are found once each, and those of its copy are others in a batch of the same type."""
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([5.0])
    batch = KINDS[kind](x, y)
    assert {id(tensor) for tensor in nested_tensors(batch)} == {id(x), id(y)}
    assert len(list(nested_tensors(batch))) == 2
    doubled = mapped(batch, lambda tensor: 2 * tensor)
    assert type(doubled) is type(batch)
    assert [tensor.tolist() for tensor in tensors_of(doubled)] == [[2.0, 4.0], [10.0]]
    assert [tensor.tolist() for tensor in tensors_of(batch)] == [[1.0, 2.0], [5.0]]


def test_paths_name_what_a_user_wrote() -> None:
    """Fields, keys and indices; a private attribute on the way is left out, unless a name would come twice."""
    graph = Graph(torch.zeros(1), torch.ones(1))
    assert [name for name, _ in named_tensors({"graph": graph, 3: [torch.zeros(1)]})] == ["graph.x", "graph.y", "3.0"]
    graph.x2 = graph._store  # type: ignore[attr-defined]
    assert [name for name, _ in named_tensors(graph)] == ["x", "y"]
    graph._other = {"x": torch.zeros(2)}  # type: ignore[attr-defined]
    assert [name for name, _ in named_tensors(graph)] == ["x", "y", "_other.x"]


def test_a_mapped_batch_keeps_its_shape() -> None:
    """Containers and what is no tensor stay as they are, named tuples too."""
    doubled = mapped(BATCH, lambda tensor: 2 * tensor)
    assert doubled["x"][0].tolist() == [2.0, -6.0]
    assert doubled["x"][1][1] == "text"
    assert isinstance(doubled["x"][1], tuple)
    assert isinstance(doubled["pair"], Pair)
    assert doubled["pair"].y == [None]
    assert BATCH["x"][0].tolist() == [1.0, -3.0]  # type: ignore[union-attr]


def test_packed_sequences_and_arrays() -> None:
    """A packed sequence is a named tuple of four tensors; floating arrays are looked at, and left as they are."""
    sequence, array = packed(torch.ones(3, 3)), np.array([1.0, np.nan])
    array.flags.writeable = False
    batch = [sequence, array, np.array(["text"]), np.float64(3)]
    assert [name for name, _ in named_tensors(batch)] == [
        "0.data", "0.batch_sizes", "0.sorted_indices", "0.unsorted_indices", "1",
    ]  # fmt: skip
    moved = mapped(batch, lambda tensor: tensor + 1)
    assert isinstance(moved[0], PackedSequence)
    assert moved[1] is array


def test_what_leads_too_far_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules, loaders and iterators are whole, and nothing is followed deeper than a threshold, nor for ever."""

    class Odd:
        pass

    odd: Any = Odd()
    odd.model, odd.data, odd.rest = torch.nn.Linear(1, 1), torch.utils.data.TensorDataset(torch.ones(1)), iter([odd])
    odd.near, odd.far, odd.again = torch.ones(1), [[torch.ones(2)]], odd
    assert [tensor.numel() for tensor in nested_tensors(odd)] == [1, 2]
    monkeypatch.setattr(measured, "DEEPEST_PART", 2)
    assert [tensor.numel() for _, tensor in named_tensors(odd)] == [1]


def test_a_type_that_cannot_be_taken_apart_is_named_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line at INFO, for a type that hides what it holds and for one that fails."""
    monkeypatch.setattr(containers, "_known", {})

    class Broken(UserDict[str, Tensor]):
        def items(self) -> Any:
            raise OSError("the file is gone")

    with caplog.at_level("INFO"):
        for _ in range(3):
            assert list(nested_tensors([memoryview(b"12"), Broken(), torch.ones(1)])) == [torch.ones(1)]
            assert len(mapped(Broken(), lambda tensor: tensor)) == 0
    assert len(caplog.records) == 2
    assert "cannot look inside values of type builtins.memoryview, so the numbers in them are not" in caplog.text
    assert f"{Broken.__qualname__}, so the numbers in them are not checked: OSError('the file is gone')" in caplog.text


def test_bytes_that_a_batch_keeps_alive() -> None:
    """Tensors and arrays of every dtype and texts count, each once, wherever they lie."""
    picture, words = np.zeros((10, 10), dtype=np.uint8), b"0" * 500
    batch = {"x": torch.zeros(5, dtype=torch.int64), "again": [picture, [picture]], "graph": Pair(words, (None,))}  # type: ignore[arg-type]
    assert bytes_of(batch) == 40 + 100 + getsizeof(words) + getsizeof(None)


@pytest.mark.parametrize("part", [array("B", bytes(9)), np.array([object()]), iter([1]), torch.zeros(1)])
def test_a_batch_whose_bytes_are_not_known(part: Any) -> None:
    """A part of a type that cannot be taken apart, and a tensor that holds more than its numbers, may be large."""
    assert bytes_of([torch.zeros(2), (part,)], lambda tensor: len(tensor) == 1) is None
