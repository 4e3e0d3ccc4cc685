"""Finds the poisoned tensors of a checkpoint, which hold NaN or Inf and should not."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from lightning_nanguard.measure.finite import non_finite_indices
from lightning_nanguard.measure.tensors import dense_values, local, shape_of
from lightning_nanguard.state.finite import SECOND_MOMENTS
from lightning_nanguard.state.learner import StateKey, unwrapped


@final
class KnownWeights(NamedTuple):
    """What is known of a module, to find the poisoned tensors of its checkpoints.

    Attributes:
        tensors: The module's parameters and buffers. A tensor with the name and the shape of one counts as a weight.
        allowed: Elements of weights and buffers that are non-finite by design, from
            :func:`lightning_nanguard.state.finite.allowances`.
        own: Names of the buffers that are not checked, from :func:`lightning_nanguard.state.finite.own_buffers`.
    """

    tensors: Mapping[str, Tensor]
    allowed: Mapping[StateKey, Tensor]
    own: Collection[str] = ()


def poisoned(checkpoint: Mapping[str, Any], known: KnownWeights) -> list[str]:
    """Names of the weights, buffers, moments and averaged copies in a checkpoint that hold NaN or Inf.

    Other values in it (scores of callbacks, metrics) may be infinite and are not checked.

    Args:
        checkpoint: A checkpoint of Lightning, or any other nesting of dictionaries and lists.
        known: What is known of the module.

    Example:
        >>> known = KnownWeights({"w": torch.ones(2)}, allowed={})
        >>> bad = {"w": torch.tensor([1.0, float("nan")])}
        >>> poisoned({"state_dict": bad, "callbacks": {"best": torch.tensor(1e999)}}, known)
        ['state_dict: w']
    """
    found = [*_looked_at(checkpoint, known.tensors, ())]
    bad, overflow = [], _squares_overflow(checkpoint)
    for index in non_finite_indices([local(tensor) for _, _, tensor in found]):
        where, name, tensor = found[index]
        weight, wrong = unwrapped(name), ~torch.isfinite(dense_values(tensor))
        mask = known.allowed.get(("buffer", weight), known.allowed.get(("parameter", weight)))
        if mask is not None and mask.shape == wrong.shape:
            wrong &= ~mask.to(wrong.device)
        if overflow and name.partition(" of parameter ")[0] in SECOND_MOMENTS:
            wrong &= dense_values(tensor) != torch.inf
        if weight not in known.own and bool(wrong.any()):
            bad.append(f"{'/'.join(where)}: {name}")
    return bad


def _squares_overflow(checkpoint: Mapping[str, Any]) -> bool:
    """Whether the gradients of the run are so large that its second moments are infinite."""
    guard = state_of_guard(checkpoint).get("guard")
    return isinstance(guard, Mapping) and bool(guard.get("large_gradients_usual"))


def state_of_guard(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The guard's own state in a checkpoint; empty if it has none."""
    callbacks = checkpoint.get("callbacks")
    states = callbacks.items() if isinstance(callbacks, Mapping) else ()
    guards = (state for key, state in states if "NaNGuard" in str(key) and isinstance(state, Mapping))
    return next(guards, {})


def _looked_at(
    value: Any, weights: Mapping[str, Tensor], where: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], str, Tensor]]:
    if isinstance(value, Mapping):
        if is_optimizer_state(value):
            for parameter, entries in value["state"].items():
                for path, tensor in _tensors(entries, ()):
                    yield where, f"{'.'.join(path)} of parameter {parameter}", tensor
            return
        for key, item in value.items():
            if isinstance(item, Tensor):
                if is_weight(key, item, weights):
                    yield where, key, item
            else:
                yield from _looked_at(item, weights, (*where, str(key)))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            if not isinstance(item, Tensor):
                yield from _looked_at(item, weights, (*where, str(number)))


def _tensors(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, (*path, str(key)))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item, path)


def is_optimizer_state(value: Mapping[Any, Any]) -> bool:
    """Whether a part of a checkpoint is an optimizer's ``state_dict()``."""
    return isinstance(value.get("state"), Mapping) and isinstance(value.get("param_groups"), list)


def is_weight(key: Any, item: Tensor, weights: Mapping[str, Tensor]) -> bool:
    """Whether a tensor of a checkpoint has the name and the shape of one of the module's."""
    live = weights.get(unwrapped(key)) if isinstance(key, str) else None
    return live is not None and shape_of(live) == shape_of(item)
