"""Which tensors of a state are not finite, or far larger than they were."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_nanguard.measure.finite import non_finite_indices
from lightning_nanguard.measure.norms import norms
from lightning_nanguard.state.learner import StateKey, describe
from lightning_nanguard.state.snapshot import _tensors


def allowances(leaves: Iterable[tuple[StateKey, Any]]) -> dict[StateKey, Tensor]:
    """Where buffers are non-finite by design (an attention mask of −inf): path to a bool mask of such elements."""
    buffers = [(path, leaf) for path, leaf in leaves if path[0] == "buffer"]
    return {
        buffers[index][0]: ~torch.isfinite(buffers[index][1].detach())
        for index in non_finite_indices([buffer for _, buffer in buffers])
    }


def jumped(
    now: Mapping[StateKey, Any], then: Mapping[StateKey, Any], names: Collection[StateKey], factor: float
) -> str | None:
    """Name of the first tensor among ``names`` whose largest element has grown ``factor`` times, above 1."""
    pairs = [(path, now[path], then[path]) for path in now if path in names and path in then]
    pairs = [(path, one, other) for path, one, other in pairs if _comparable(one, other)]
    if not pairs:
        return None
    largest, was = (
        norms(tensors, math.inf) for tensors in ([one for _, one, _ in pairs], [two for _, _, two in pairs])
    )
    far = (path for (path, _, _), one, other in zip(pairs, largest, was, strict=True) if one > factor * max(other, 1.0))
    found = next(far, None)
    return None if found is None else describe(found)


def _comparable(one: Any, other: Any) -> bool:
    tensors = isinstance(one, Tensor) and isinstance(other, Tensor)
    return tensors and one.is_floating_point() and 0 < one.numel() == other.numel()


def corrupt(
    leaves: Iterable[tuple[StateKey, Any]],
    allowed: Mapping[StateKey, Tensor],
    shapes: Mapping[StateKey, torch.Size] | None = None,
) -> str | None:
    """Name of the first tensor with a non-finite element that is not allowed, ``None`` when there is none.

    Args:
        leaves: What to look at.
        allowed: From :func:`allowances`.
        shapes: Buffers of the start of fit; one that was made or resized since (a mask built in the first forward) is
            left alone, since nothing says what it should hold.
    """
    flat = [(path, tensor) for path, leaf in leaves for tensor in _tensors(leaf)]
    for index in non_finite_indices([tensor for _, tensor in flat]):
        path, tensor = flat[index]
        if path[0] == "buffer" and shapes is not None and shapes.get(path) != tensor.shape:
            continue
        mask = _allowance(path, allowed)
        if mask is not None and mask.shape == tensor.shape:
            bad = ~torch.isfinite(tensor.detach())
            if not bool((bad & ~mask.to(bad.device)).any()):
                continue
        return describe(path)
    return None


def to_be_finite(
    leaves: Iterable[tuple[StateKey, Any]],
    allowed: Mapping[StateKey, Tensor],
    shapes: Mapping[StateKey, torch.Size],
) -> Iterator[tuple[StateKey, Tensor]]:
    """What :func:`corrupt` looks at, zero where it may be non-finite; waits for no device."""
    for path, leaf in leaves:
        for tensor in _tensors(leaf):
            if path[0] == "buffer" and shapes.get(path) != tensor.shape:
                continue
            mask = _allowance(path, allowed)
            if mask is None or mask.shape != tensor.shape:
                yield path, tensor
            else:
                yield path, tensor.masked_fill(mask.to(tensor.device, non_blocking=tensor.is_cuda), 0)


def _allowance(path: StateKey, allowed: Mapping[StateKey, Tensor]) -> Tensor | None:
    # An averaged copy holds the module's masks too, and may appear in mid-run.
    own = ("buffer", path[2].removeprefix("module.")) if path[0] == "average" else path
    return allowed.get(path, allowed.get(own))
