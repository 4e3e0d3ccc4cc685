"""What a loop tells the guard, and what a loop that can do little answers."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_nanguard.guard.context import Settings
from lightning_nanguard.guard.loop import BatchReplay
from tests.guard.plain_loop import PlainLoop, is_finite, nan_at, remedies
from tests.helpers import copied, differences


def test_a_loop_that_cannot_run_batches_again_says_so() -> None:
    """Every answer is that nothing is known, so the guard tries nothing."""
    replay = BatchReplay()
    assert not replay.comparable()
    assert replay.rehearsal_batches() == 0
    with replay.showing(3) as shown:
        assert not shown
    with replay.rehearsing():
        answers = [replay.batch_finite(), replay.batch_strange(), replay.probe(), replay.gradient_finite()]
        assert [*answers, replay.train_on(0), replay.loss_on(0)] == [None] * 6


@pytest.mark.parametrize("deferred", [False, True], ids=["step", "deferred"])
def test_such_a_loop_is_guarded_all_the_same(deferred: bool) -> None:
    """A bad batch is skipped or undone, and a rate far too high is cut, though no lower one can be tried."""
    settings = Settings(snapshot_every=4, deferred=deferred)
    loop = PlainLoop(replay=BatchReplay(), settings=settings)
    loop.run(20, nan_at(12))
    assert remedies(loop) == [("restore",) if deferred else ("skip",)]
    ruined = PlainLoop(replay=BatchReplay(), settings=settings, lr=100.0)
    ruined.run(150)
    assert ruined.guard.context.rate.multiplier < 0.1
    assert is_finite(ruined)


class Accumulating(PlainLoop):
    """Makes one update of two micro-batches."""

    def micro_batches(self) -> int:
        return 2

    def train(self, batch: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        for number, self.batch in enumerate(batch.chunk(2)):
            self.guard.open_batch()
            loss = self.loss() / 2
            self.guard.see_loss(loss)
            loss.backward()
            if number == 1:
                self.guard.before_step(0)
                self.optimizer.step()
                self.step += 1
            assert self.guard.close_batch() is not None
            assert self.guard.in_window is (number == 0)


def test_a_window_of_accumulation_is_one_update() -> None:
    """Its loss is the mean of the micro-batches' undivided losses."""
    loop = Accumulating()
    began = [copied(loop.net.weight), copied(loop.net.bias)]
    loop.run(1)
    plain = PlainLoop()
    with torch.no_grad():
        plain.net.weight.copy_(began[0])
        plain.net.bias.copy_(began[1])
    plain.run(1)
    losses = [one.guard.context.monitors.history(0).losses() for one in (loop, plain)]
    assert losses[0] == pytest.approx(losses[1])
    assert loop.guard.updates == 1


@pytest.mark.parametrize("row", [0, 7])
def test_a_bad_micro_batch_costs_its_window(row: int) -> None:
    """Wherever in it it stands; the run is bit by bit as if the window had not been there."""
    ends = []
    for bad in (True, False):
        torch.manual_seed(0)
        loop = Accumulating()
        spoil = (lambda step, batch: batch[row].fill_(math.nan) if step == 9 else None) if bad else nan_at()
        loop.run(16, spoil, without=None if bad else 9)
        ends.append(copied(loop.net.state_dict()))
        assert remedies(loop) == ([("skip",)] if bad else [])
    assert differences(*ends) == []
