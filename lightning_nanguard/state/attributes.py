"""Restores plain attributes of modules and data sets after the user's code was run again."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

CONTAINERS = (list, dict, set, deque, bytearray)
"""What is restored one level deep; a subclass of the user's may do more than hold things."""

MISSING: Any = object()
"""Stands for an attribute that is not there."""

OWN = frozenset(vars(nn.Module()))
"""What torch keeps in every module itself: parameters, buffers, hooks. Who copies tensors puts it back."""


def refill(container: Any, held: Any) -> None:
    """Restore what a container held; the container itself stays the same object."""
    container.clear()
    (container.update if isinstance(container, (dict, set)) else container.extend)(held)


@contextmanager
def attributes_kept(*owners: Any) -> Iterator[None]:
    """Put the attributes of some objects back at the end: counters, lists that grow, generators of random numbers.

    Attributes are bound again to what they were bound to; lists, dictionaries, sets and deques among them get back
    what they held, one level deep. Tensors, modules and whatever lies deeper are left alone.

    Args:
        owners: The objects; of a module also every module in it.

    Example:
        >>> class Counter:
        ...     seen, outputs = 0, []
        >>> counter = Counter()
        >>> counter.outputs = [1]
        >>> with attributes_kept(counter):
        ...     counter.seen += 1
        ...     counter.outputs.append(2)
        >>> counter.seen, counter.outputs
        (0, [1])
    """
    undo = [step for owner in owners for one in _parts(owner) for step in _remember(one)]
    try:
        yield
    finally:
        for step in undo:
            step()


def _parts(owner: Any) -> Iterator[Any]:
    yield from owner.modules() if isinstance(owner, nn.Module) else (owner,)


def _remember(owner: Any) -> Iterator[Callable[[], None]]:
    attributes = getattr(owner, "__dict__", None)
    if not isinstance(attributes, dict):
        return
    skipped = OWN if isinstance(owner, nn.Module) else frozenset()
    before = {name: value for name, value in attributes.items() if name not in skipped}

    def rebind() -> None:
        for name in [name for name in attributes if name not in before and name not in skipped]:
            del attributes[name]
        for name, value in before.items():
            if attributes.get(name, MISSING) is not value:
                attributes[name] = value

    yield rebind
    for value in before.values():
        step = _content(value)
        if step is not None:
            yield step


def _content(value: Any) -> Callable[[], None] | None:
    if isinstance(value, torch.Generator):
        return partial(_set_state, value, value.get_state())
    if isinstance(value, np.random.Generator):
        numbers = copy.deepcopy(value.bit_generator.state)
        return lambda: setattr(value.bit_generator, "state", numbers)
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    return partial(refill, value, copy.copy(value)) if type(value) in CONTAINERS else None


def _set_state(generator: torch.Generator, state: torch.Tensor) -> None:
    generator.set_state(state)
