"""A trial trains restarts with lower rates on the newest batches, and leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_nanguard.guard.context import Settings
from lightning_nanguard.guard.trial import TrialRunner
from lightning_nanguard.types import Trial
from tests.guard.plain_loop import PlainLoop, remedies, state
from tests.helpers import copied, differences


class Keeps(PlainLoop):
    """A loop that can run its newest batches again.

    Args:
        lr: Learning rate.
        options: What else :class:`PlainLoop` takes.
    """

    def __init__(self, lr: float, **options: object) -> None:
        super().__init__(lr=lr, **options)
        self.kept: list[Tensor] = []

    def train(self, batch: Tensor) -> None:
        super().train(batch)
        self.kept = [*self.kept, batch][-48:]

    def rehearsal_batches(self) -> int:
        return len(self.kept)

    def loss_on(self, index: int) -> float | None:
        self.batch = self.kept[index]
        return super().loss_on(index)

    def train_on(self, index: int) -> float | None:
        self.batch = self.kept[index]
        return super().train_on(index)


class Bounded(Keeps):
    """Its loss is at most 10, so that a rate too high ruins it without a number that is not finite."""

    def loss(self) -> Tensor:
        return 10 * torch.tanh(super().loss() / 10)


def tried(loop: PlainLoop) -> Trial | None:
    """What a trial shows now."""
    context = loop.guard.context
    certified = context.ring.certified
    return TrialRunner(context, loop.guard._parts.investigator._rehearsal).run(certified[-1], certified[0])


def test_a_trial_leaves_no_trace() -> None:
    """Weights, moments, rates, gradients and random numbers are bit by bit as before, whatever it shows."""
    loop = Keeps(lr=0.05)
    loop.run(50)
    before = copied(state(loop))
    assert tried(loop) == Trial()
    assert differences(copied(state(loop)), before) == []


@pytest.mark.parametrize(("lr", "acts"), [(2.0, True), (0.05, False), (1e-5, False)])
def test_a_rate_that_ruins_is_found(lr: float, acts: bool) -> None:
    """At a rate far too high a restart with a lower one learns what the run does not, and the guard goes back and takes
    that rate; at a good rate or one that is too low none does better."""
    loop = Bounded(lr=lr, settings=Settings(snapshot_every=4, act_on="evidence"))
    torch.manual_seed(0)
    loop.net.reset_parameters()
    loop.run(100)
    assert bool(loop.records) == acts
    if acts:
        assert remedies(loop)[0] == ("restore", "scale")
        assert loop.records[0].cause == "learning_rate_too_high"
        assert loop.guard.context.rate.ratio() < 1
        assert (loop.probe() or 0.0) < 0.1


def test_too_few_batches_show_nothing() -> None:
    """A share is not told from noise by eight batches, and the guard leaves the run alone."""
    loop = Bounded(lr=20.0, settings=Settings(snapshot_every=4, act_on="evidence"))
    loop.run(100)
    loop.kept = loop.kept[:8]
    assert tried(loop) is None


def test_a_batch_that_cannot_be_run_again_shows_nothing() -> None:
    """Where the loop cannot give a loss there is no trial."""

    class Refuses(Keeps):
        def loss_on(self, index: int) -> float | None:
            return None

    loop = Refuses(lr=0.05)
    loop.run(50)
    assert tried(loop) is None
