"""Attributes put back after code of the user's has run once more."""

from __future__ import annotations

import io
import random
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_nanguard.state.attributes import attributes_kept, content, give_back, is_content, reach, same


class Plain:
    """An object that is no module."""

    def __init__(self) -> None:
        self.seen = 0
        self.draws = np.random.default_rng(5)


def test_attributes_kept_reaches_what_it_promises() -> None:
    """Names, containers and generators come back; new names go; tensors are left to others."""
    net, plain = nn.Sequential(nn.Linear(2, 2), nn.Tanh()), Plain()
    net.many, net.named, net.dice = [1], {"a": 1}, random.Random(3)
    net.old, net.numbers = np.random.RandomState(2), torch.Generator().manual_seed(1)
    net[1].outputs = set[int]()
    drawn = []
    for _ in range(2):
        with attributes_kept(net, plain, 7):
            net.many.append(2)
            net.named = {}
            net.more = 5
            net[1].outputs.add(3)
            plain.seen += 1
            net[0].weight.data.fill_(4.0)
            drawn.append(
                [net.dice.random(), net.old.rand(), float(torch.rand((), generator=net.numbers)), plain.draws.random()]
            )
    assert (net.many, net.named, hasattr(net, "more"), net[1].outputs, plain.seen) == ([1], {"a": 1}, False, set(), 0)
    assert drawn[0] == drawn[1]
    assert bool((net[0].weight == 4.0).all())


CONTENTS = {
    "list": (lambda: [1, 2], lambda one: one.append(3)),
    "dict": (lambda: {"a": 1}, lambda one: one.update(b=2)),
    "set": (lambda: {1}, lambda one: one.add(2)),
    "deque": (lambda: deque([1, 2], maxlen=2), lambda one: one.append(3)),
    "defaultdict": (lambda: defaultdict(list, a=[1]), lambda one: one["b"]),
    "Counter": (lambda: Counter(a=2), lambda one: one.update("aab")),
    "array": (lambda: np.arange(3.0), lambda one: one.fill(7)),
    "tensor": (lambda: torch.arange(3.0), lambda one: one.fill_(7)),
    "torch generator": (lambda: torch.Generator().manual_seed(1), lambda one: torch.rand(1, generator=one)),
    "numpy generator": (lambda: np.random.default_rng(1), lambda one: one.random()),
    "numpy state": (lambda: np.random.RandomState(1), lambda one: one.rand()),
    "python generator": (lambda: random.Random(1), lambda one: one.random()),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_what_a_value_holds_is_put_back(kind: str) -> None:
    """A change in place is seen, and undone in the same object."""
    make, change = CONTENTS[kind]
    value = make()
    assert is_content(value, 1 << 10)
    held = content(value)
    told = repr(value.tolist() if isinstance(value, (np.ndarray, torch.Tensor)) else held)
    assert same(value, held)
    change(value)
    assert not same(value, held)
    give_back(value, held)
    assert repr(value.tolist() if isinstance(value, (np.ndarray, torch.Tensor)) else content(value)) == told


def test_large_tensors_and_arrays_are_left_alone() -> None:
    """They are not copied beyond the limit, nor is an array that cannot be written."""
    fixed = np.zeros(2)
    fixed.flags.writeable = False
    assert not any(is_content(one, 8) for one in (torch.zeros(3), np.zeros(3), fixed, "text", 1, (1, 2)))


class Replayed(IterableDataset[int]):
    """A replay buffer."""

    def __init__(self) -> None:
        self.seen = deque([1], maxlen=3)

    def __iter__(self) -> Iterator[int]:
        return iter(self.seen)


def test_data_sets_that_are_held_are_put_back() -> None:
    """Steps of reinforcement learning write into their own data set; loaders and optimizers are left to others."""
    net = nn.Linear(2, 2)
    net.replay = Replayed()
    net.loader = DataLoader(net.replay)
    with attributes_kept(net):
        net.replay.seen.append(2)
    assert list(net.replay.seen) == [1]
    assert reach(net, 0).owners == [net, net.replay]


def test_objects_that_are_held_are_reached() -> None:
    """Plain objects and what lies in containers are found; what works beside the step, classes and files are not."""
    net = nn.Sequential(nn.Linear(2, 2))
    inside, rows = SimpleNamespace(count=1), [np.zeros(2)]
    net.holder = SimpleNamespace(deep={"inside": inside}, rows=rows)
    net.worker = SimpleNamespace(lock=threading.Lock(), count=1)
    net.kind, net.file, net.function = Plain, io.StringIO(), test_large_tensors_and_arrays_are_left_alone
    net.optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    found = reach(net, 1 << 10)
    assert [one for one in found.owners if not isinstance(one, nn.Module)] == [net.holder, inside]
    assert [one for one in found.items if isinstance(one, np.ndarray)] == rows
    assert not found.streams
    net.more = {"stream": iter([1, 2])}
    assert reach(net, 1 << 10).streams
