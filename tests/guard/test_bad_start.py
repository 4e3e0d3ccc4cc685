"""Numbers that are not finite before the first update."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor, nn

from lightning_nanguard import TrainingDivergedError
from lightning_nanguard.guard.context import Settings
from tests.guard.plain_loop import PlainLoop, is_finite, nan_at, remedies
from tests.helpers import copied, differences


def bad_bias(loop: PlainLoop) -> PlainLoop:
    with torch.no_grad():
        loop.net.bias[0] = math.nan
    return loop


def test_a_run_that_is_lost_from_the_start_ends() -> None:
    """With the first update that comes of it, and the parameter is named."""
    with pytest.raises(TrainingDivergedError, match="parameter bias holds NaN or Inf before the first update"):
        bad_bias(PlainLoop()).run(1)


def test_the_batch_that_shows_it_leaves_nothing_behind() -> None:
    """The weights are the only bad numbers of the module, as before the run."""

    class Ends(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
            nn.init.constant_(self[0].weight, math.nan)

    loop = PlainLoop(net=Ends)
    before = copied(dict(loop.net.named_buffers()))
    with pytest.raises(TrainingDivergedError, match=r"parameter 0\.weight"):
        loop.run(1)
    assert differences(before, copied(dict(loop.net.named_buffers()))) == []


def test_a_bad_batch_does_not_end_it() -> None:
    """The fault may be that of the batch, which is then skipped."""
    loop = bad_bias(PlainLoop())
    with pytest.raises(TrainingDivergedError, match="parameter bias"):
        loop.run(5, nan_at(0, 1))
    assert (loop.step, remedies(loop)) == (3, [("skip",), ("skip",)])


def test_an_observing_guard_ends_nothing() -> None:
    """It records the fault of each update."""
    loop = bad_bias(PlainLoop(settings=Settings(snapshot_every=4, observe=True)))
    loop.run(3)
    assert loop.records


class Survives(PlainLoop):
    """Its loss does not depend on the bias."""

    def loss(self) -> Tensor:
        return (self.batch @ self.net.weight.T - self.batch.sum(1, keepdim=True)).square().mean()


def test_training_may_survive_it(caplog: pytest.LogCaptureFixture) -> None:
    """An unused parameter is named in the log. Once an update was healthy, it ends no run."""
    loop = bad_bias(Survives())
    with caplog.at_level(logging.INFO, logger="lightning_nanguard"):
        loop.run(10, nan_at(5))
    assert "parameter bias holds NaN or Inf before the first update; these elements are not checked" in caplog.text
    assert remedies(loop) == [("skip",)]


class Normalised(nn.Module):
    """A linear layer over batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(3), nn.Linear(3, 1)
        self.norm.running_mean.fill_(math.nan)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.norm(x))
        return out


def test_bad_running_statistics_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """They do not change the training, so only the user can know what they should be."""
    loop = PlainLoop(net=Normalised)
    loop.run(5)
    assert "buffer norm.running_mean holds NaN or Inf before the first update, so that the module" in caplog.text
    assert loop.records == []
    assert not is_finite(loop)
