"""Undoing the present batch, window or micro-batch."""

from __future__ import annotations

import torch
from torch import nn

from lightning_nanguard.guard.batch_undos import BatchUndos
from lightning_nanguard.state.batch_undo import BatchUndo


class Counter(nn.Module):
    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))


def test_what_is_undone() -> None:
    """The newest micro-batch alone, or the whole window, or an earlier batch that is judged late."""
    net = Counter()
    undos, called = BatchUndos(lambda: BatchUndo(net), 2), []
    undos.open(within=False)
    undos.also(lambda: called.append("first"))
    first = undos.present
    net.count += 1
    undos.open(within=True)
    assert undos.present is first
    assert undos.newest is not first
    net.count += 10
    undos.newest.undo()
    assert float(net.count) == 1.0
    undos.open(within=False)
    assert undos.newest is undos.present is not first
    net.count += 100
    undos.undo()
    assert (float(net.count), called) == (1.0, [])
    first.undo()
    assert (float(net.count), called) == (0.0, ["first"])


def test_a_batch_that_begins_again() -> None:
    """It is undone to the state from which it began again."""
    net, called = Counter(), []
    undos = BatchUndos(lambda: BatchUndo(net), 1)
    undos.open(within=False)
    undos.also(lambda: called.append("old"))
    net.count += 5
    undos.begin_again(lambda: called.append("new"))
    net.count += 1
    undos.undo()
    assert (float(net.count), called) == (5.0, ["new"])
