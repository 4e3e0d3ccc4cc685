"""Local, dense values of any tensor: sharded, sparse, complex."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

import torch
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor (``DTensor``, ``ShardedTensor``), on the same memory; any other as it is."""
    if type(tensor) in _PLAIN:
        return tensor
    part = tensor
    if hasattr(tensor, "local_shards"):
        part = next((shard.tensor for shard in tensor.local_shards()), torch.empty(0))
    elif hasattr(tensor, "to_local"):
        part = tensor.detach().to_local()  # type: ignore[attr-defined]
    return part


_PLAIN = (Tensor, torch.nn.Parameter)


def dense_values(gradient: Tensor) -> Tensor:
    """The numbers of a gradient: of a sparse one those it stores, duplicates added up; of a sharded one this rank's."""
    gradient = local(gradient).detach()
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients there are; sparse ones as the numbers they store, sharded ones as this rank's part."""
    return plain([gradient for p in parameters if (gradient := p.grad) is not None])


def plain(found: list[Tensor]) -> list[Tensor]:
    """Sparse gradients as the numbers they store, sharded ones as this rank's part, others as they are."""
    if set(map(type, found)) - {Tensor}:
        found = [local(gradient) for gradient in found]
    # One pass in C: a call for each costs more than the norm on a model of many small parameters.
    return [dense_values(g) if g.is_sparse else g for g in found] if any(map(_IS_SPARSE, found)) else found


_IS_SPARSE = attrgetter("is_sparse")


is_at_hand = attrgetter("is_cpu")
"""Whether reading a tensor waits for no device."""


def moved_to(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    # Without waiting only towards the device: a copy to the host would be read before it has arrived.
    return tensor.to(device, dtype, non_blocking=device.type == "cuda")


WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def size(tensor: Tensor) -> int:
    """Bytes of the numbers a tensor stores."""
    return size(tensor.coalesce().values()) if tensor.is_sparse else tensor.numel() * tensor.element_size()
