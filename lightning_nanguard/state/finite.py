"""Which tensors of a learner are not finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor

from lightning_nanguard.measure.batches import nested_tensors
from lightning_nanguard.measure.finite import non_finite_indices
from lightning_nanguard.state.learner import Learner, StateKey, describe, unwrapped


def allowances(leaves: Iterable[tuple[StateKey, Any]]) -> dict[StateKey, Tensor]:
    """Where buffers are non-finite by design (an attention mask of −inf): state key to a bool mask of such elements."""
    buffers = [(key, leaf) for key, leaf in leaves if key[0] == "buffer"]
    return {
        buffers[index][0]: ~torch.isfinite(buffers[index][1].detach())
        for index in non_finite_indices([buffer for _, buffer in buffers])
    }


@final
class FiniteCheck:
    """Finds tensors of a learner that are not finite, for all parts of the guard that look at its state.

    Elements of buffers that were not finite when the fit began are allowed. A buffer that was made or resized since (a
    mask built in the first forward) is left out, since nothing says what it should hold.
    """

    def __init__(self) -> None:
        self._allowed: dict[StateKey, Tensor] = {}
        self._shapes: dict[StateKey, torch.Size] = {}

    def begin(self, learner: Learner) -> None:
        """Note which elements of the learner's buffers are non-finite by design: those that are so now."""
        weights = [*learner.weights()]
        self._allowed = allowances(weights)
        self._shapes = {key: leaf.shape for key, leaf in weights if key[0] == "buffer"}

    @property
    def allowed(self) -> Mapping[StateKey, Tensor]:
        """The elements allowed to be non-finite, as :func:`allowances` gives them."""
        return self._allowed

    def corrupt(self, leaves: Iterable[tuple[StateKey, Any]]) -> str | None:
        """Name of the first tensor with a non-finite element that is not allowed, ``None`` if there is none."""
        flat = list(self._checked(leaves))
        for index in non_finite_indices([tensor for _, tensor in flat]):
            key, tensor = flat[index]
            mask = self._mask(key, tensor)
            if mask is not None:
                bad = ~torch.isfinite(tensor.detach())
                if not bool((bad & ~mask.to(bad.device)).any()):
                    continue
            return describe(key)
        return None

    def to_be_finite(self, leaves: Iterable[tuple[StateKey, Any]]) -> Iterator[tuple[StateKey, Tensor]]:
        """The tensors that :meth:`corrupt` looks at, zero where they may be non-finite; waits for no device."""
        for key, tensor in self._checked(leaves):
            mask = self._mask(key, tensor)
            if mask is not None:
                tensor = tensor.masked_fill(mask.to(tensor.device, non_blocking=tensor.is_cuda), 0)
            yield key, tensor

    def _checked(self, leaves: Iterable[tuple[StateKey, Any]]) -> Iterator[tuple[StateKey, Tensor]]:
        for key, leaf in leaves:
            for tensor in nested_tensors(leaf):
                if key[0] != "buffer" or self._shapes.get(key) == tensor.shape:
                    yield key, tensor

    def _mask(self, key: StateKey, tensor: Tensor) -> Tensor | None:
        # An averaged copy holds the module's masks too, and may appear in mid-run.
        own = ("buffer", unwrapped(key[2])) if key[0] == "average" else key
        mask = self._allowed.get(key, self._allowed.get(own))
        return mask if mask is not None and mask.shape == tensor.shape else None
