"""Attributes put back after code of the user's has run once more."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn

from lightning_nanguard.state.attributes import attributes_kept


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
