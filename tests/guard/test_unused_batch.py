"""Batches from which no update is made; whole runs are in tests/scenarios/test_left_out_by_user.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.guard.plain_loop import PlainLoop


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
