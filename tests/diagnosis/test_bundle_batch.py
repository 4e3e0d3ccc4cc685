"""Batches as JSON and named tensors."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_nanguard.diagnosis.bundle_batch import put_together, take_apart
from tests.batches import KINDS, Graph, Slots, packed, tensors_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning"),
]


class Deletes:
    """Runs code when it is let go of."""

    def __del__(self) -> None:
        pass


def again(batch: Any) -> Any:
    tensors: dict[str, Tensor] = {}
    missing: list[str] = []
    structure = take_apart(batch, "batch", tensors, missing)
    assert missing == []
    return put_together(json.loads(json.dumps(structure)), tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back(kind: str) -> None:
    """The batch has the type it had, with the same tensors, and the rest of it too."""
    batch = KINDS[kind](torch.ones(3, 2), torch.zeros(3))
    back = again(batch)
    assert type(back) is type(batch)
    assert [tensor.tolist() for tensor in tensors_of(back)] == [tensor.tolist() for tensor in tensors_of(batch)]
    if isinstance(batch, dict):
        assert list(back) == list(batch)
    if isinstance(batch, Graph):
        assert back.itself is back
        assert back.parent() is back


EYE = torch.eye(3)
ODD = {
    "sparse": EYE.to_sparse,
    "csr": EYE.to_sparse_csr,
    "csc": EYE.to_sparse_csc,
    "complex": lambda: EYE * 1j,
    "float8": lambda: EYE.to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_tensors_come_back(kind: str) -> None:
    """Sparse tensors have the layout they had, and every dtype is kept."""
    tensor = ODD[kind]()
    (back,) = again((tensor,))
    assert (back.dtype, back.layout) == (tensor.dtype, tensor.layout)
    assert torch.equal(back.to_dense().to(torch.complex64), tensor.to_dense().to(torch.complex64))


def test_sequences_and_arrays_come_back() -> None:
    """Packed sequences, nested tensors of both layouts, and arrays of numbers."""
    sequence, array = packed(torch.arange(6.0).view(3, 2)), np.arange(3)
    parts = [torch.ones(2, 3), torch.zeros(1, 3)]
    nested = [torch.nested.nested_tensor(parts, layout=layout) for layout in (torch.strided, torch.jagged)]
    back = again([sequence, *nested, array])
    assert [part.tolist() for part in back[0]] == [part.tolist() for part in sequence]
    for mine, theirs in zip(nested, back[1:3], strict=True):
        assert mine.layout == theirs.layout
        assert [part.tolist() for part in theirs.unbind()] == [part.tolist() for part in parts]
    assert back[3].tolist() == [0, 1, 2]


def test_what_cannot_be_kept_is_named() -> None:
    """A class that no name leads to, a tensor without numbers, and an object that hides what it holds."""

    class Local:
        def __init__(self) -> None:
            self.x = torch.ones(1)

    missing: list[str] = []
    batch = {"a": Local(), "b": torch.ones(1, device="meta"), "c": memoryview(b"1")}
    assert take_apart(batch, "batch/0", {}, missing) == {"dict": [[key, {"value": None}] for key in batch]}
    assert missing == [
        f"batch/0/a ({__name__}.{Local.__qualname__})", "batch/0/b (torch.Tensor)", "batch/0/c (builtins.memoryview)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("home", "how"),
    [
        ("elsewhere.batches:Slots", "attributes"),  # not there
        ("this:s", "attributes"),  # there, and not imported
        ("subprocess:Popen", "items"),
        ("builtins:exec", "items"),
        ("os:system", "items"),
        ("builtins:int", "attributes"),
        ("tests.diagnosis.test_bundle_batch:Slots", "items"),  # its constructor would be called
        ("tests.diagnosis.test_bundle_batch:Deletes", "attributes"),
    ],
)
def test_a_class_is_neither_imported_nor_called(home: str, how: str) -> None:
    """Only containers, and classes that the program has imported itself, are made; the error says what to do."""
    structure = take_apart(Slots(torch.ones(1), torch.ones(1)), "batch", tensors := {}, [])
    structure["object"][:2] = home, how
    before = set(sys.modules)
    with pytest.raises(ValueError, match=rf"holds a {home}, which is not imported\. .* Name a --module whose file"):
        put_together(structure, tensors)
    assert set(sys.modules) == before


def test_a_layout_that_is_none_is_refused() -> None:
    """What stands for a layout of tensors is looked up among layouts alone."""
    with pytest.raises(ValueError, match=r"there is no layout 'torch\.load' of tensors"):
        put_together({"nested": ["torch.load", []]}, {})
