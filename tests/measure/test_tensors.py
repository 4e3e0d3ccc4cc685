"""The local, dense values of any tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_nanguard.measure.tensors import (
    dense_gradients,
    dense_values,
    gradients,
    is_plain,
    local,
    moved_to,
    size,
)
from tests.odd_tensors import ODD, QUIET, EightBit

pytestmark = [pytest.mark.filterwarnings(one) for one in QUIET]

SPARSE = torch.tensor([[0.0, 2.0], [3.0, 0.0]])


class Sharded(Tensor):
    """Stands for a DTensor: this rank's part is its first row."""

    def to_local(self) -> Tensor:
        return torch.arange(3.0)


def sharded() -> Tensor:
    return torch.zeros(2, 3).as_subclass(Sharded)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
@pytest.mark.parametrize(
    ("make", "values"),
    [
        (lambda: torch.tensor([1.0, 2.0], requires_grad=True) * 1, [1.0, 2.0]),
        (SPARSE.to_sparse, [2.0, 3.0]),
        (SPARSE.to_sparse_csr, [2.0, 3.0]),
        (lambda: torch.tensor([1 + 2j]), [1.0, 2.0]),
        (lambda: torch.tensor([1 + 2j]).conj(), [1.0, -2.0]),
        (sharded, [0.0, 1.0, 2.0]),
    ],
    ids=["dense", "sparse", "compressed", "complex", "conjugate", "sharded"],
)
def test_dense_values(make: Callable[[], Tensor], values: list[float]) -> None:
    """Every kind of tensor gives the real numbers it stores, without a graph."""
    found = dense_values(make())
    assert found.flatten().tolist() == values
    assert not found.requires_grad


def test_local_is_the_same_memory() -> None:
    """A tensor that is not sharded is its own part, and a ``ShardedTensor`` without a shard here has an empty one."""
    tensor = torch.ones(2)
    assert local(tensor) is tensor
    assert local(sharded()).tolist() == [0.0, 1.0, 2.0]

    class NoShards(Tensor):
        def local_shards(self) -> list[Tensor]:
            return []

    assert local(torch.ones(2).as_subclass(NoShards)).numel() == 0


def test_gradients_of_parameters() -> None:
    """Parameters without a gradient are left out, and sparse gradients come as what they store, duplicates added."""
    table = nn.Embedding(10, 2, sparse=True)
    table(torch.tensor([3, 3])).sum().backward()
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    idle = nn.Parameter(torch.zeros(2))
    dense, stored = gradients([weight, idle, table.weight])
    assert dense is weight.grad
    assert stored.tolist() == [[2.0, 2.0]]
    plain = [torch.ones(1)]
    assert dense_gradients(plain) is plain
    assert dense_gradients([sharded()])[0].tolist() == [0.0, 1.0, 2.0]


def test_size_is_what_is_stored() -> None:
    """Bytes are those of the numbers, of a sparse tensor those it stores."""
    assert size(torch.zeros(3, dtype=torch.float64)) == 24
    assert size(SPARSE.to_sparse()) == 8


def test_moved_to() -> None:
    """A tensor arrives with the values it had, in the dtype asked for."""
    moved = moved_to(torch.tensor(1.5, dtype=torch.float16), torch.device("cpu"), torch.float64)
    assert (moved.dtype, moved.item()) == (torch.float64, 1.5)


@pytest.mark.parametrize("kind", ODD)
def test_every_kind_of_tensor_gives_its_numbers(kind: str) -> None:
    """They are plain, real and finite, and NaN among them is seen; a tensor on the meta device has none."""
    values = dense_values(ODD[kind]())
    assert is_plain(values)
    assert not values.is_complex()
    assert bool(values.isfinite().all())
    assert (values.numel() == 0) == (kind == "meta")


def test_a_type_whose_numbers_cannot_be_read_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """Its numbers count as none."""

    class Sealed(EightBit):
        def __tensor_flatten__(self) -> tuple[list[str], None]:
            raise NotImplementedError("sealed")

        def dequantize(self) -> Tensor:
            raise NotImplementedError

    with caplog.at_level("INFO"):
        for _ in range(3):
            assert dense_values(Sealed.of(torch.ones(2))).numel() == 0
    assert caplog.text.count(f"{Sealed.__qualname__} cannot be read, so they are not checked") == 1
