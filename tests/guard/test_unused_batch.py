"""Batches in which no optimizer steps.

Whole runs are in tests/scenarios/test_accumulation_by_hand.py and test_left_out_by_user.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_nanguard.guard.context import Settings
from tests.guard.plain_loop import PlainLoop, remedies


class Accumulates(PlainLoop):
    """Adds the gradients of several batches, and cannot run a batch again."""

    def comparable(self) -> bool:
        return False

    def add(self, value: float = 1.0, *, read: bool = True) -> None:
        """A batch in which no optimizer steps.

        Args:
            value: A number of the batch.
            read: Whether the loss can be read before its backward pass.
        """
        self.batch = torch.full((8, 3), value)
        self.guard.open_batch()
        loss = self.loss()
        self.guard.see_loss(loss)
        if not read:
            self.guard._parts.steps.unused.open()
        loss.backward()
        self.guard.close_batch()

    def gradients(self) -> list[Tensor]:
        return [torch.zeros(()) if p.grad is None else p.grad.clone() for p in self.net.parameters()]


def started(*, lasts: bool = True, **options: Any) -> Accumulates:
    """A loop after some updates.

    Args:
        lasts: Whether gradients have lasted from one batch to the next.
        options: Those of the loop.
    """
    loop = Accumulates(**options)
    loop.run(4)
    loop.optimizer.zero_grad()
    if lasts:
        loop.add()
        loop.add()
        loop.optimizer.zero_grad()
    return loop


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_gradients_of_earlier_batches_are_kept(read: bool, first: bool) -> None:
    """They are as before the bad batch; if its loss could not be read before its backward pass, they are zero."""
    loop = started()
    if not first:
        loop.add()
    before = loop.gradients()
    loop.add(math.nan, read=read)
    expected = before if read else [torch.zeros_like(one) for one in before]
    assert all(bool((now == then).all()) for now, then in zip(loop.gradients(), expected, strict=True))
    assert remedies(loop) == [("leave out",)]
    loop.add()
    assert remedies(loop) == [("leave out",)]
    assert all(bool(one.isfinite().all()) for one in loop.gradients())


@pytest.mark.parametrize(
    ("settings", "lasts"),
    [(Settings(observe=True), True), (Settings(deferred=True), True), (Settings(), False)],
)
def test_nothing_is_left_out(settings: Settings, lasts: bool) -> None:
    """Where the guard only observes, where it must not wait for a loss, and where each batch begins without gradients:
    code may skip a step by itself, as a GradScaler does."""
    loop = started(settings=settings, lasts=lasts)
    loop.add(math.nan)
    assert remedies(loop) == []
    assert not all(bool(one.isfinite().all()) for one in loop.gradients())


@pytest.mark.parametrize("spoils", [True, False])
@pytest.mark.parametrize("weight", [True, False])
def test_only_what_the_forward_pass_made_bad_is_undone(spoils: bool, weight: bool) -> None:
    """A buffer that the batch made NaN is restored, unless a weight is bad, too: then the value has another source."""
    loop = PlainLoop(net=lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)))
    mean = loop.net[0].running_mean
    loop.run(6)
    loop.guard.open_batch()
    with torch.no_grad():
        if spoils:
            mean.fill_(math.nan)
        if weight:
            next(loop.net.parameters()).fill_(math.nan)
    loop.guard._parts.steps.unused.undo_spoilt_buffers()
    undone = spoils and not weight
    assert [one.place for one in loop.records] == (["buffer 0.running_mean"] if undone else [])
    assert bool(torch.isfinite(mean).all()) is (undone or not spoils)
