"""Rates are tried out without a trace."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean

import pytest
import torch

from lightning_nanguard import Reading
from lightning_nanguard.detect.monitors import Monitors
from lightning_nanguard.guard.rehearsal import Rehearsal, Reviews
from lightning_nanguard.state import switch as switch_module
from lightning_nanguard.state.device import OutOfMemory
from lightning_nanguard.state.snapshot import capture
from lightning_nanguard.thresholds.rate_search import ReviewThresholds
from tests.guard.plain_loop import PlainLoop, state
from tests.helpers import copied, same_bits


def rehearsal_of(loop: PlainLoop) -> Rehearsal:
    """Tries rates in a loop whose loss unit is 1."""
    monitors = Monitors([])
    for step, loss in enumerate((2.0, 1.0)):
        seen = Reading(step, 0, loss, 1.0)
        monitors.check(seen)
        monitors.accept(seen)
    return Rehearsal(dataclasses.replace(loop.guard.context, monitors=monitors))


def test_the_loss_is_that_of_training_at_the_rate() -> None:
    """What is rehearsed is what training at that rate brings, and the learner is left where it began."""
    loop = PlainLoop(lr=0.1)
    loop.guard.context.rate.attach()
    loop.batch = torch.randn(8, 3)
    rehearsal = rehearsal_of(loop)
    base = capture(loop.guard.context.learner, step=0, global_step=0)
    before = copied(state(loop))
    rehearsed = rehearsal.loss_after(base, 0.5, 5)
    assert same_bits(state(loop), before)
    loop.optimizer.param_groups[0]["lr"] = 0.05
    for _ in range(10):  # under momentum twice as many
        loop.train_on(0)
    assert rehearsed == loop.probe()


class Played(PlainLoop):
    """Four batches, whose losses before each update are given."""

    at_base = (1.0, 40.0, 0.5, 2.0)

    def __init__(self, *rounds: tuple[float, ...]) -> None:
        super().__init__(lr=0.1)
        self.left = [loss for losses in rounds for loss in losses]

    def rehearsal_batches(self) -> int:
        return 4

    def train_on(self, index: int) -> float | None:
        return self.left.pop(0)

    def loss_on(self, index: int) -> float | None:
        return self.at_base[index]


@pytest.mark.parametrize(
    ("rounds", "gone", "left"),
    [
        ([(1.0, 40.0, 0.5, 2.0), (0.9, 30.0, 0.4, 1.5)], False, 0),
        ([(1.0, 40.0, 0.5, 2.0), (3.5, 30.0, 0.4, 1.5)], False, 0),
        ([(1.0, 40.0, 0.5, 2.0), (3.5, 200.0, 0.4, 1.5)], True, 2),
        ([(1.0, 40.0, 3.0, 7.0), (0.9, 30.0, 0.4, 1.5)], True, 4),
        ([(1.0, math.nan, 0.5, 2.0), (0.9, 30.0, 0.4, 1.5)], True, 6),
    ],
    ids=["batches that differ", "one update too far", "two that rise", "two that rise before their turn", "not finite"],
)
def test_a_batch_is_compared_with_itself(rounds: list[tuple[float, ...]], gone: bool, left: int) -> None:
    """A batch whose loss is many times another's ends no trial; two in a row whose own losses rise from the base do."""
    loop = Played(*rounds)
    rehearsal = rehearsal_of(loop)
    base = capture(loop.guard.context.learner, step=0, global_step=0)
    assert rehearsal.loss_after(base, 0.5, 0) == fmean(loop.at_base)
    assert rehearsal.loss_after(base, 0.5, 4) == (math.inf if gone else fmean(loop.at_base))  # under momentum 8 updates
    assert len(loop.left) == left


@pytest.mark.parametrize(("lr", "factor"), [(0.001, 2.0), (0.1, 1.0), (1.5, 1.0)])
def test_a_review_raises_a_rate_that_hardly_moves_the_loss(lr: float, factor: float) -> None:
    """A rate at which four times as much brings far more is doubled, another is not, and no trial leaves a trace."""
    loop = PlainLoop(lr=lr)
    loop.guard.context.rate.attach()
    loop.batch = torch.randn(8, 3, generator=torch.Generator().manual_seed(3))
    rehearsal = rehearsal_of(loop)
    before = copied(state(loop))
    assert rehearsal.review(1.0, at_most=2.0) == factor
    assert rehearsal.review(1.0, at_most=1.0) == min(1.0, factor)
    assert same_bits(state(loop), before)


class Noisy(PlainLoop):
    """Four small batches whose targets are half noise."""

    def rehearsal_batches(self) -> int:
        return 4

    def loss_on(self, index: int) -> float | None:
        self.show(index)
        return self.probe()

    def train_on(self, index: int) -> float | None:
        self.show(index)
        return super().train_on(index)

    def show(self, index: int) -> None:
        draw = torch.Generator().manual_seed(10 + index)
        self.batch, self.noise = torch.randn(3, 3, generator=draw), torch.randn(3, 1, generator=draw)

    def loss(self) -> torch.Tensor:
        assert self.batch is not None
        return (self.net(self.batch) - self.batch.sum(1, keepdim=True) - self.noise).square().mean()


@pytest.mark.parametrize(("lr", "untrained", "factor"), [(0.2, 3.0, 0.25), (0.2, 60.0, 1.0), (0.002, 3.0, 1.0)])
def test_a_review_lowers_a_rate_that_forgets_what_it_learned(lr: float, untrained: float, factor: float) -> None:
    """Where updates on two batches take back a tenth of what was learned on two others the rate is quartered; at a rate
    at which they do not, or where that is little beside what was learned, it stays."""
    loop = Noisy(lr=lr)
    loop.guard.context.rate.attach()
    with torch.no_grad():
        loop.net.weight.fill_(1.0)
        loop.net.bias.zero_()
    loop.show(0)
    rehearsal = rehearsal_of(loop)
    before = copied(state(loop))
    assert rehearsal.review(untrained, at_most=1.0) == factor
    assert same_bits(state(loop), before)


def test_each_batch_is_compared_under_both_states() -> None:
    """The loss of every batch at hand under two states, leaving no trace, not even in the loss scale, which going back
    to an older state lowers; and none where there is no batch."""
    loop = Noisy(lr=0.1)
    loop.show(0)
    learner = loop.guard.context.learner
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    rehearsal = rehearsal_of(loop)
    start = capture(learner, step=0, global_step=0)
    then = [loop.loss_on(index) for index in range(4)]
    for index in range(4):
        loop.train_on(index)
    learner.scaler.load_state_dict({**learner.scaler.state_dict(), "scale": 4096.0})
    later = capture(learner, step=4, global_step=4)
    before, scale = copied(state(loop)), learner.scaler.state_dict()
    now = [loop.loss_on(index) for index in range(4)]
    assert rehearsal.compare_each(later, start) == list(zip(now, then, strict=True))
    assert same_bits(state(loop), before)
    assert learner.scaler.state_dict() == scale
    loop.rehearsal_batches = lambda: 0  # type: ignore[method-assign]
    assert rehearsal.compare_each(later, start) == []


class ByChance(Noisy):
    """A loss of which chance makes the most, as noise levels or dropout do."""

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        with torch.random.fork_rng():
            yield

    def loss(self) -> torch.Tensor:
        return super().loss() * torch.rand(()) * 3


@pytest.mark.parametrize("seed", range(12))
def test_chance_in_the_loss_is_not_taken_for_forgetting(seed: int) -> None:
    """At a rate that moves nothing a review changes nothing, however much the loss varies by itself."""
    loop = ByChance(lr=1e-12)
    loop.guard.context.rate.attach()
    loop.show(0)
    torch.manual_seed(seed)
    assert rehearsal_of(loop).review(30.0, at_most=2.0) == 1.0


def test_reviews_come_at_growing_intervals() -> None:
    """50 healthy updates after a cut, then after 200, 800 and so on; a resumed run keeps the dates."""
    reviews = Reviews(ReviewThresholds())
    assert not reviews.due(1000)
    reviews.begin(1000)
    resumed = Reviews(ReviewThresholds())
    resumed.load_state_dict(reviews.state_dict())
    assert [step for step in range(1000, 2100) if resumed.due(step)] == [1050, 1250, 2050]


@pytest.mark.parametrize("fails", ["copy", "updates"])
def test_a_rate_that_cannot_be_tried_for_lack_of_memory_is_not(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full device gives no answer, and the learner, the rate and the gradients are as they were."""
    loop = PlainLoop(lr=0.1)
    loop.batch = torch.randn(8, 3)
    loop.loss().backward()
    rehearsal = rehearsal_of(loop)
    before, gradient = copied(state(loop)), loop.net.weight.grad

    def full(*args: object, **options: object) -> float:
        raise OutOfMemory("CUDA out of memory")

    if fails == "copy":
        monkeypatch.setattr(switch_module, "capture", full)
    else:
        monkeypatch.setattr(loop, "train_on", full)
        with rehearsal.present() as present:
            assert present is not None
            assert rehearsal.loss_after(present, 0.5, 5) is None
    assert rehearsal.harmful(2.0) is False
    assert rehearsal.review(10.0, at_most=2.0) == 1.0
    assert same_bits(state(loop), before)
    assert loop.net.weight.grad is gradient
    assert loop.guard.context.rate.multiplier == 1.0
