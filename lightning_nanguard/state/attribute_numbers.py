"""Restores numbers among a module's attributes, such as running means, if hooks around a bad step made them NaN."""

from __future__ import annotations

from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from lightning_nanguard.measure.tensors import is_strided
from lightning_nanguard.state.attribute_memory import Attributes
from lightning_nanguard.thresholds.batches import RepeatedStepsThresholds

_KINDS = frozenset({float, Tensor, np.ndarray})


@final
class AttributeNumbers:
    """Stores the numbers with which the last good step began.

    :class:`Attributes` restores what the step itself changed. This class restores what was changed before it, in
    ``on_after_batch_transfer`` or ``on_train_batch_start``, or after it, in ``on_train_batch_end``. It does not restore
    infinite numbers, because code that looks for a minimum begins with one.

    Args:
        limits: Bytes up to which tensors and arrays are stored.

    Example:
        >>> from types import SimpleNamespace
        >>> module, numbers = SimpleNamespace(mean=0.5), AttributeNumbers()
        >>> numbers.open(Attributes([(module, ())]))
        >>> module.mean = float("nan")
        >>> numbers.open(Attributes([(module, ())]))
        >>> numbers.undo()
        >>> module.mean
        0.5
    """

    def __init__(self, limits: RepeatedStepsThresholds = RepeatedStepsThresholds()) -> None:
        self._limits = limits
        self._good: list[tuple[dict[str, Any], str, Any]] = []
        self._newest: list[tuple[dict[str, Any], str, Any]] = []
        self._undone = False

    def begin(self) -> None:
        """Before a step, restore what was changed since a step that was left out."""
        if self._undone:
            self._put_back()

    def open(self, attributes: Attributes) -> None:
        """Store the numbers with which a step begins.

        Args:
            attributes: The attributes at its beginning.
        """
        if not self._undone:
            self._good = self._newest
        # This runs in every step, so the cheap check of the class comes first.
        bound, most = attributes.bound(_KINDS), self._limits.copied_bytes
        self._newest = [one for one in bound if type(one[2]) is float or _is_small(one[2], most)]
        self._undone = False

    def undo(self) -> None:
        """Restore the numbers, because the step is left out."""
        self._undone = True
        self._put_back()

    def _put_back(self) -> None:
        for attributes, name, value in self._good:
            now = attributes.get(name)
            if now is not value and _has_nan(now) and not _has_nan(value):
                attributes[name] = value


def _is_small(value: Any, copied_bytes: int) -> bool:
    if isinstance(value, Tensor):
        # A value with a graph would keep the activations of its step in memory.
        return value.grad_fn is None and is_strided(value) and value.nbytes <= copied_bytes
    return bool(value.nbytes <= copied_bytes)


def _has_nan(value: Any) -> bool:
    if isinstance(value, Tensor):
        return is_strided(value) and bool(torch.isnan(value.detach()).any())
    if type(value) is np.ndarray:
        return np.issubdtype(value.dtype, np.inexact) and bool(np.isnan(value).any())
    return isinstance(value, float) and value != value
