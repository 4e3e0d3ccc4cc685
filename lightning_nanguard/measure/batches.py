"""The tensors in a batch of nested mappings and sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from lightning_nanguard.measure.tensors import dense_values


def largest_magnitudes(batch: Any) -> list[float]:
    """Largest absolute value of every floating tensor in a nested batch. Reads from the device."""
    tensors = [dense_values(tensor) for tensor in floating_tensors(batch) if tensor.numel() > 0]
    return [float(tensor.abs().max()) for tensor in tensors]


def floating_tensors(batch: Any) -> Iterator[Tensor]:
    """Every floating tensor in nested mappings and sequences."""
    return (tensor for tensor in nested_tensors(batch) if tensor.is_floating_point() or tensor.is_complex())


def nested_tensors(batch: Any) -> Iterator[Tensor]:
    """Every tensor in nested mappings and sequences."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for item in batch.values():
            yield from nested_tensors(item)
    elif isinstance(batch, (list, tuple)):
        for item in batch:
            yield from nested_tensors(item)


def mapped(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The batch with every tensor in nested mappings and sequences replaced by what ``function`` makes of it."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: mapped(item, function) for key, item in batch.items()}
    if isinstance(batch, (list, tuple)):
        items = [mapped(item, function) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch
