"""Local and dense values of any tensor: sharded, sparse, nested, quantised, complex, 8-bit, or of a subclass."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

_logger = logging.getLogger("lightning_nanguard")

WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
"""The dtype for norms and sums of half-precision tensors, which would soon overflow in their own dtype."""

_WHOLE = (Tensor, torch.nn.Parameter)
_COMPRESSED = {torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}
# Floating-point dtypes that torch can store and convert, and with which it can hardly compute.
_STORAGE_ONLY = frozenset(
    dtype for name in dir(torch) if name.startswith("float8") and isinstance(dtype := getattr(torch, name), torch.dtype)
)

_is_sparse = attrgetter("is_sparse")

is_on_host = attrgetter("is_cpu")
"""Whether a tensor can be read without waiting for a device."""


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor (``DTensor``, ``ShardedTensor``), in the same memory; others unchanged."""
    if type(tensor) in _WHOLE:
        return tensor
    mine = getattr(tensor, "_local_tensor", None)
    if type(mine) is Tensor:
        return mine  # `to_local` goes through torch's dispatcher, which takes longer than the norm of a small shard
    part = tensor
    if hasattr(tensor, "local_shards"):
        part = next((shard.tensor for shard in tensor.local_shards()), torch.empty(0))
    elif hasattr(tensor, "to_local"):
        part = tensor.detach().to_local()  # type: ignore[attr-defined]
    return part


def dense_values(tensor: Tensor) -> Tensor:
    """The numbers of a tensor as a dense real tensor; of a sharded one this rank's part. See :func:`stored_values`."""
    return stored_values(local(tensor))


def stored_values(tensor: Tensor) -> Tensor:
    """The numbers that a tensor stores, as a dense real tensor without a graph; empty if they cannot be read.

    Duplicate entries of a sparse tensor are summed. A complex tensor gives its real and imaginary parts, a quantised
    tensor its dequantised values. A type whose numbers cannot be read is logged once.
    """
    values = tensor.detach()
    if is_plain(values):
        return torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
    try:
        return _read(values)
    except Exception as error:
        _say_unread(f"{type(tensor).__module__}.{type(tensor).__qualname__}", repr(error))
        return torch.empty(0)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense and of torch's own class, with numbers of its own with which torch can compute."""
    return is_strided(tensor) and tensor.dtype not in _STORAGE_ONLY


def is_strided(tensor: Tensor) -> bool:
    """Whether a tensor is of torch's own class and can be copied as plain memory, whatever its numbers mean."""
    # Subclasses of Parameter, such as those for quantised weights, count as plain tensors.
    return (
        (type(tensor) in _WHOLE or type(tensor.detach()) is Tensor)
        and tensor.layout == torch.strided
        and not (tensor.is_nested or tensor.is_quantized or tensor.is_meta)
    )


def shape_of(tensor: Tensor) -> tuple[Any, ...]:
    """The shape of a tensor; for a nested tensor, the shapes of its parts."""
    try:
        nested = tensor.is_nested
    except RuntimeError:
        nested = False  # a ShardedTensor supports few attributes
    return tuple(map(shape_of, tensor.unbind())) if nested else tuple(tensor.shape)


def _read(values: Tensor) -> Tensor:
    if values.is_nested:
        values = values.values()
    elif values.is_meta:
        return torch.empty(0)
    elif type(values) not in _WHOLE:
        return _read_subclass(values)
    elif values.is_quantized:
        values = values.dequantize()
    elif values.is_sparse:
        values = values.coalesce().values()
    elif values.layout in _COMPRESSED:
        values = values.values()
    elif values.layout != torch.strided:
        values = values.to_dense()
    elif values.dtype in _STORAGE_ONLY:
        values = values.float()
    return values if is_plain(values) and not values.is_complex() else stored_values(values)


def _read_subclass(values: Tensor) -> Tensor:
    if not hasattr(values, "__tensor_flatten__"):
        plain = values.as_subclass(Tensor)
        plain.data_ptr()  # raises if the subclass stores its numbers elsewhere
        return stored_values(plain)
    try:
        return stored_values(values.dequantize())
    except Exception:  # most subclasses cannot be dequantised
        names, _ = values.__tensor_flatten__()
        parts = [stored_values(part) for name in names if (part := getattr(values, name)).is_floating_point()]
        return torch.cat([part.flatten().double() for part in parts]) if parts else torch.empty(0)


@cache
def _say_unread(kind: str, why: str) -> None:
    _logger.info("NaNGuard: the numbers of tensors of type %s cannot be read, so they are not checked: %s", kind, why)


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """All existing gradients: sparse ones as the numbers that they store, sharded ones as this rank's part."""
    return dense_gradients([gradient for p in parameters if (gradient := p.grad) is not None])


def dense_gradients(found: list[Tensor]) -> list[Tensor]:
    """Gradients: sparse ones as the numbers that they store, sharded ones as this rank's part, others unchanged."""
    if set(map(type, found)) - {Tensor}:
        found = [local(gradient) for gradient in found]
    # One pass in C: with many small parameters a call for each gradient takes longer than the norm.
    return [dense_values(g) if g.is_sparse else g for g in found] if any(map(_is_sparse, found)) else found


def moved_to(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The tensor on another device. Only a copy to the host is waited for."""
    # A copy to the host that is not waited for would be read too early.
    return tensor.to(device, dtype, non_blocking=device.type == "cuda")


def size(tensor: Tensor) -> int:
    """Bytes of the numbers that a tensor stores."""
    if tensor.is_sparse:
        return size(tensor.coalesce().values())
    # `nbytes` of a compressed tensor is that of a dense one.
    return size(tensor.values()) if tensor.layout in _COMPRESSED else tensor.numel() * tensor.element_size()
