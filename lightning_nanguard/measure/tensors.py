"""Local, dense values of any tensor: sharded, sparse, complex."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

import torch
from torch import Tensor

WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
"""The dtype in which a norm or a sum of a half-precision tensor is taken: in its own it would soon overflow."""

_WHOLE = (Tensor, torch.nn.Parameter)
_COMPRESSED = {torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}

_is_sparse = attrgetter("is_sparse")

is_on_host = attrgetter("is_cpu")
"""Whether reading a tensor waits for no device."""


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor (``DTensor``, ``ShardedTensor``), on the same memory; any other as it is."""
    if type(tensor) in _WHOLE:
        return tensor
    part = tensor
    if hasattr(tensor, "local_shards"):
        part = next((shard.tensor for shard in tensor.local_shards()), torch.empty(0))
    elif hasattr(tensor, "to_local"):
        part = tensor.detach().to_local()  # type: ignore[attr-defined]
    return part


def dense_values(tensor: Tensor) -> Tensor:
    """The numbers of a tensor as a dense, real one: of a sharded tensor this rank's; see :func:`stored_values`."""
    return stored_values(local(tensor))


def stored_values(tensor: Tensor) -> Tensor:
    """The numbers a tensor stores as a dense, real one without a graph.

    Duplicate entries of a sparse tensor are added up; a complex tensor counts as its real and imaginary parts.
    """
    values = tensor.detach()
    if values.is_sparse:
        values = values.coalesce().values()
    elif values.layout in _COMPRESSED:
        values = values.values()
    return torch.view_as_real(values.resolve_conj()) if values.is_complex() else values


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients there are; sparse ones as the numbers they store, sharded ones as this rank's part."""
    return dense_gradients([gradient for p in parameters if (gradient := p.grad) is not None])


def dense_gradients(found: list[Tensor]) -> list[Tensor]:
    """Sparse gradients as the numbers they store, sharded ones as this rank's part, others as they are."""
    if set(map(type, found)) - {Tensor}:
        found = [local(gradient) for gradient in found]
    # One pass in C: a call for each costs more than the norm on a model of many small parameters.
    return [dense_values(g) if g.is_sparse else g for g in found] if any(map(_is_sparse, found)) else found


def moved_to(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The tensor on another device; towards an accelerator without waiting for it."""
    # A copy to the host that is not waited for would be read before it has arrived.
    return tensor.to(device, dtype, non_blocking=device.type == "cuda")


def size(tensor: Tensor) -> int:
    """Bytes of the numbers a tensor stores."""
    return size(tensor.coalesce().values()) if tensor.is_sparse else tensor.numel() * tensor.element_size()
