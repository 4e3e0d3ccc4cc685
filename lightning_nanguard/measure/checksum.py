"""Checksums of tensors, which depend on every bit and its position."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_nanguard.measure.tensors import local

_PRIME = (1 << 63) - 25
_ROW = 4096  # words in a row; the weights of one row fit into a processor's cache
_WEIGHT_STEP, _TAIL_WEIGHT = 0x9E3779B97F4A7C1, 0x5851F42D4C957F2D


def checksum(tensors: Iterable[Tensor]) -> int:
    """A checksum of 63 bits, which depends on every bit of some tensors and its position.

    Example:
        >>> one, other = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
        >>> checksum([one]) == checksum([one.clone()]), checksum([one]) == checksum([other])
        (True, False)
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for number in checksums(tensors):
        by_device.setdefault(number.device, []).append(number)
    total = 0
    for numbers in by_device.values():
        for value in torch.stack(numbers).tolist():
            total = (total * 1_000_003 + value) % _PRIME
    return total


def checksums(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Checksums of tensors, which depend on every bit and its position. They stay on the devices of the tensors.

    Args:
        tensors: Strided tensors.

    Returns:
        0-dim tensors, one or two for each tensor.
    """
    found: list[Tensor] = []
    weights: dict[torch.device, Tensor] = {}
    for tensor in tensors:
        data = _bytes(tensor)
        if data.device not in weights:
            weights[data.device] = word_weights(data)
        aligned = len(data) // 8 * 8
        words = data[:aligned].view(torch.int64)
        parts = [words, data[aligned:]] if aligned < len(data) else [words]
        found.extend(weighted_sum(part, weights[data.device]) for part in parts)
    return found


def _bytes(tensor: Tensor) -> Tensor:
    data = local(tensor).detach().resolve_conj().resolve_neg().contiguous().view(-1)
    # A view as 64-bit words must begin at a multiple of eight bytes.
    return (data.clone() if data.storage_offset() * data.itemsize % 8 else data).view(torch.uint8)


def word_weights(like: Tensor) -> Tensor:
    """The weights of :func:`weighted_sum`, on the device of a tensor."""
    return (torch.arange(_ROW, device=like.device) * _WEIGHT_STEP) | 1


def weighted_sum(words: Tensor, weights: Tensor) -> Tensor:
    """Checksum of 64-bit words, 0-dim, on the device of the words.

    Args:
        words: The words, one-dimensional.
        weights: From :func:`word_weights`.
    """
    # All weights are odd, so that a change of one word is not lost if a sum overflows.
    if len(words) <= _ROW:
        return (words * weights[: len(words)]).sum()
    whole = len(words) // _ROW * _ROW
    rows = words[:whole].view(-1, _ROW)
    # Sums by column and by row together depend on the position of a word, and are limited only by memory bandwidth.
    placed = weighted_sum(rows.sum(0), weights) + 2 * weighted_sum(rows.sum(1), weights)
    return placed + _TAIL_WEIGHT * weighted_sum(words[whole:], weights)
