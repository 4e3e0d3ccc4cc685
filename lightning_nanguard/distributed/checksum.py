"""Checksums of the learner's state. With these, ranks check whether they hold the same state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_nanguard.measure.checksum import checksum
from lightning_nanguard.measure.tensors import is_strided, local
from lightning_nanguard.state.learner import StateKey


def is_replicated(key: StateKey, leaf: Any) -> bool:
    """Whether every rank should hold the same value: parameters and moments, but not buffers and averaged copies."""
    return key[0] in ("parameter", "optimizer") and isinstance(leaf, Tensor) and is_strided(local(leaf))


def checksums(leaves: Mapping[StateKey, Any]) -> tuple[int, int]:
    """Checksums of all parameters, and of all optimizer state. Each one reads once from each device."""
    replicated = [(key, leaf) for key, leaf in leaves.items() if is_replicated(key, leaf)]
    return (
        checksum(leaf for key, leaf in replicated if key[0] == "parameter"),
        checksum(leaf for key, leaf in replicated if key[0] == "optimizer"),
    )
