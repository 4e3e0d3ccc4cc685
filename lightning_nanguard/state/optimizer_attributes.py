"""Finds what a user's optimizer keeps in attributes of its own instead of ``state``: moments, counters, lists."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_nanguard.measure.batches import nested_tensors
from lightning_nanguard.measure.tensors import is_strided, local

_NOT_OWN = frozenset({"state", "param_groups", "defaults"})


def own_leaves(
    optimizer: Optimizer, names: Mapping[int, str], stepped: Iterable[Tensor]
) -> Iterator[tuple[tuple[Any, ...], dict[Any, Any], Any]]:
    """The tensors, lists of tensors and numbers among an optimizer's own attributes.

    The values of dictionaries are given one by one. The weights, and tensors that share memory with them, are left out.

    Args:
        optimizer: The optimizer. Those of torch keep everything in ``state``.
        names: Names of parameters by identity, for dictionaries whose keys are parameters.
        stepped: The tensors that the optimizer steps.

    Yields:
        The path, the dictionary that holds the value, and its key there. The path is the name of the attribute,
        followed by the key in it, or by the name of the parameter that is the key.
    """
    if type(optimizer).__module__.startswith("torch.optim"):
        return
    attributes, weights = vars(optimizer), _memory_of(stepped)
    for name, value in list(attributes.items()):
        if name in _NOT_OWN:
            continue
        if type(value) is dict:
            for key, entry in list(value.items()):
                if _holds_state(entry, weights):
                    yield (name, names.get(id(key), key)), value, key
        elif _holds_state(value, weights) or (type(value) in (int, float) and not name.startswith("_")):
            yield (name,), attributes, name


def _memory_of(tensors: Iterable[Tensor]) -> frozenset[int]:
    plain = (local(one) for one in tensors if not is_lazy(one))
    return frozenset(one.untyped_storage().data_ptr() for one in plain if is_strided(one))


def _holds_state(value: Any, weights: frozenset[int]) -> bool:
    if not (isinstance(value, Tensor) or type(value) in (list, tuple, dict)):
        return False
    tensors = list(nested_tensors(value))
    return bool(tensors) and weights.isdisjoint(_memory_of(tensors))
