"""Checksums of the learner's state, by which ranks find out whether they hold the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_nanguard.measure.tensors import is_strided, local
from lightning_nanguard.state.learner import StateKey

_PRIME = (1 << 63) - 25
_ROW = 4096  # words in a row; the weights of one row fit into a processor's cache
_WEIGHT_STEP, _TAIL_WEIGHT = 0x9E3779B97F4A7C1, 0x5851F42D4C957F2D


def is_replicated(key: StateKey, leaf: Any) -> bool:
    """Whether every rank should hold the same value: parameters and moments do, buffers and averaged copies may not."""
    return key[0] in ("parameter", "optimizer") and isinstance(leaf, Tensor) and is_strided(local(leaf))


def checksums(leaves: Mapping[StateKey, Any]) -> tuple[int, int]:
    """Checksums of all parameters, and of all optimizer state. Each of them reads once from each device."""
    replicated = [(key, leaf) for key, leaf in leaves.items() if is_replicated(key, leaf)]
    return (
        checksum(leaf for key, leaf in replicated if key[0] == "parameter"),
        checksum(leaf for key, leaf in replicated if key[0] == "optimizer"),
    )


def checksum(tensors: Iterable[Tensor]) -> int:
    """A number of 63 bits that depends on every bit of some tensors and on the bit's place.

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
            weights[data.device] = (torch.arange(_ROW, device=data.device) * _WEIGHT_STEP) | 1
        aligned = len(data) // 8 * 8
        words = data[:aligned].view(torch.int64)
        parts = [words, data[aligned:]] if aligned < len(data) else [words]
        sums.setdefault(data.device, []).extend(_weighted_sum(part, weights[data.device]) for part in parts)
    total = 0
    for numbers in sums.values():
        for number in torch.stack(numbers).tolist():
            total = (total * 1_000_003 + number) % _PRIME
    return total


def _bytes(tensor: Tensor) -> Tensor:
    data = local(tensor).detach().contiguous().view(-1)
    # A view as words of eight bytes must begin at a multiple of eight.
    return (data.clone() if data.storage_offset() * data.itemsize % 8 else data).view(torch.uint8)


def _weighted_sum(words: Tensor, weights: Tensor) -> Tensor:
    # All weights are odd, so that no change of one word is lost when a sum overflows.
    if len(words) <= _ROW:
        return (words * weights[: len(words)]).sum()
    whole = len(words) // _ROW * _ROW
    rows = words[:whole].view(-1, _ROW)
    # Sums by column and by row together depend on a word's place, and run at the speed of memory.
    placed = _weighted_sum(rows.sum(0), weights) + 2 * _weighted_sum(rows.sum(1), weights)
    return placed + _TAIL_WEIGHT * _weighted_sum(words[whole:], weights)
