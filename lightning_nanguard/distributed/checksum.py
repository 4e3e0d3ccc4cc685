"""Checksums of the learner's state, by which ranks find out that they hold the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_nanguard.measure.tensors import local


def replicated(path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether every rank should hold the same: parameters and moments, but no buffers or averaged copies."""
    return path[0] in ("parameter", "optimizer") and isinstance(leaf, Tensor) and leaf.layout == torch.strided


def checksums(leaves: Mapping[tuple[Any, ...], Any]) -> tuple[int, int]:
    """Checksums of the bits of all parameters, and of all optimizer state. Reads from each device once for each."""
    own = [(path, leaf) for path, leaf in leaves.items() if replicated(path, leaf)]
    return (
        checksum(leaf for path, leaf in own if path[0] == "parameter"),
        checksum(leaf for path, leaf in own if path[0] == "optimizer"),
    )


_PRIME = (1 << 63) - 25


_ROW = 4096  # words, whose weights stay in a processor's cache


def checksum(tensors: Iterable[Tensor]) -> int:
    """A number of 63 bits that depends on every bit of some tensors and on its place.

    Example:
        >>> one, other = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
        >>> checksum([one]) == checksum([one.clone()]), checksum([one]) == checksum([other])
        (True, False)
    """
    sums: dict[torch.device, list[Tensor]] = {}
    weights: dict[torch.device, Tensor] = {}
    for tensor in tensors:
        data = _bytes(tensor)
        if data.device not in weights:
            weights[data.device] = (torch.arange(_ROW, device=data.device) * 0x9E3779B97F4A7C1) | 1
        whole = len(data) // 8 * 8
        parts = [data[:whole].view(torch.int64), data[whole:]] if whole < len(data) else [data.view(torch.int64)]
        sums.setdefault(data.device, []).extend(_weighed(part, weights[data.device]) for part in parts)
    total = 0
    for numbers in sums.values():
        for number in torch.stack(numbers).tolist():
            total = (total * 1_000_003 + number) % _PRIME
    return total


def _bytes(tensor: Tensor) -> Tensor:
    data = local(tensor).detach().contiguous().view(-1)
    # Words of eight bytes begin at a multiple of eight.
    return (data.clone() if data.storage_offset() * data.itemsize % 8 else data).view(torch.uint8)


def _weighed(words: Tensor, weights: Tensor) -> Tensor:
    # Every word counts an odd number of times, so that no change of one word is lost where sums wrap around.
    if len(words) <= _ROW:
        return (words * weights[: len(words)]).sum()
    whole = len(words) // _ROW * _ROW
    rows = words[:whole].view(-1, _ROW)
    # Sums by column and by row say together where a word stands, at the speed of memory.
    place = _weighed(rows.sum(0), weights) + 2 * _weighed(rows.sum(1), weights)
    return place + 0x5851F42D4C957F2D * _weighed(words[whole:], weights)
