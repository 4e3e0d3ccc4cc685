"""The evidence that the policy decides on."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_nanguard import Fault, Reading
from lightning_nanguard.guard.context import Settings
from lightning_nanguard.guard.found import FoundFault
from lightning_nanguard.guard.investigator import norms_to_grow_from
from lightning_nanguard.state.snapshot import capture
from lightning_nanguard.thresholds import Thresholds
from lightning_nanguard.types import Evidence
from tests.guard.memory_ranks import memory_ranks
from tests.guard.plain_loop import EVIDENCE, PlainLoop, remedies, state
from tests.helpers import copied, differences

BATCH = Fault("non_finite_loss", "batch", "loss", math.nan)
WEIGHTS = Fault("mine", "batch", "loss", 9.0)


def look(loop: PlainLoop, fault: Fault = WEIGHTS, *, loss: float = 9.0, **known: Any) -> Evidence:
    """The evidence on a fault of the newest update."""
    step = loop.guard.updates
    reading = Reading(step, 0, loss, 1.0, math.isfinite(loss), math.isfinite(loss))
    before = known.pop("before", {})
    at_hand = known.pop("at_hand", True)
    found = FoundFault(fault, reading)
    known_yet = Evidence(step, **known)
    return loop.guard._parts.investigator.look_into(found, known_yet, at_hand=at_hand, before=before)[0]


def trained(**options: Any) -> PlainLoop:
    loop = PlainLoop(**options)
    loop.run(40)
    return loop


def grow(loop: PlainLoop, factor: float) -> None:
    with torch.no_grad():
        loop.net.weight *= factor


def test_looking_leaves_no_trace() -> None:
    """Weights, moments, gradients and random numbers are bit by bit as before, though older weights were tried."""
    loop = trained()
    grow(loop, 5.0)
    before = copied(state(loop))
    assert look(loop).comparison is not None
    assert differences(copied(state(loop)), before) == []


def test_the_batch_is_compared_under_both_weights() -> None:
    """Its loss under the weights of now and under the last good ones."""
    loop = trained()
    good = loop.guard.context.ring.certified[0]
    grow(loop, 5.0)
    ruined, comparison = loop.probe(), look(loop).comparison
    assert comparison is not None
    assert comparison.now == ruined
    with torch.no_grad():
        loop.net.weight.copy_(good.leaves["parameter", "weight"])
        loop.net.bias.copy_(good.leaves["parameter", "bias"])
    assert comparison.then == loop.probe()
    assert comparison.then < 1e-3 < comparison.now


@pytest.mark.parametrize(
    ("observe", "bad", "at_hand", "finite", "compared"),
    [
        (False, True, True, False, False),
        (False, True, False, None, True),
        (False, False, True, True, True),
        (True, False, True, True, False),
    ],
    ids=["a bad batch", "another batch at hand", "a good batch", "observing"],
)
def test_when_weights_are_compared(
    observe: bool, bad: bool, at_hand: bool, finite: bool | None, compared: bool
) -> None:
    """A batch that holds NaN is known to be at fault, so older weights are not tried; one that is not at hand is not
    looked at, and an observing guard tries nothing. A loss that is finite when it is computed again says nothing."""
    loop = trained(settings=Settings(snapshot_every=4, observe=observe))
    if bad:
        loop.batch = torch.full((8, 3), math.nan)
    evidence = look(loop, BATCH, loss=math.nan, at_hand=at_hand)
    assert evidence.batch_finite is finite
    assert (evidence.comparison is not None) is compared
    if evidence.comparison is not None and at_hand:
        assert evidence.comparison.now == evidence.comparison.then


def test_what_is_not_finite_by_design_is_no_corruption() -> None:
    """A mask of −inf that was there at the start is allowed to be so, wherever it is; a NaN in its place is not."""

    class Masked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 1)
            self.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1))

    loop = PlainLoop(net=Masked)
    loop.run(12)
    assert loop.records == []
    assert look(loop, loss=math.nan).corrupt is None
    loop.net.mask[0, 0] = math.nan
    assert look(loop, loss=math.nan).corrupt == "buffer mask"
    assert look(loop).corrupt is None  # no finite loss depends on it
    assert look(loop, loss=math.nan, before={"mask": torch.zeros(2, 2)}).corrupt is None  # the batch did it
    assert look(loop, loss=math.nan, undo=True).corrupt is None  # or the update that is to be undone


def test_growth_is_measured_from_an_ordinary_beginning() -> None:
    """A matrix that begins small counts as if it had begun at the norm of a linear layer; one that begins at nothing
    may grow without limit."""
    small, nothing, large = torch.full((3, 4), 1e-6), torch.zeros(3, 4), torch.full((3, 4), 10.0)
    leaves = [(("parameter", name), leaf) for name, leaf in (("small", small), ("nothing", nothing), ("large", large))]
    norms = norms_to_grow_from([*leaves, (("parameter", "bias"), torch.ones(3))])
    assert norms == pytest.approx({"small": 1.0, "nothing": 0.0, "large": 10 * math.sqrt(12)})


def test_a_weight_far_larger_than_any_was_is_named() -> None:
    """No update that is let through makes such a weight."""
    loop = trained()
    loop.net.weight.data[0, 1] = 9e3
    assert look(loop).jump is None
    loop.net.weight.data[0, 1] = 2e4
    assert look(loop).jump == "parameter weight"
    assert look(loop).growth > 1e3


@pytest.mark.parametrize("known", [2, 4])
def test_a_batch_that_comes_back_is_not_looked_into_each_time(known: int) -> None:
    """After so many verdicts against batches only every further power of two is: the loss under older weights was
    taken in vain. Each is skipped all the same."""
    looks = Counter[int]()

    class Looks(PlainLoop):
        def probe(self, *, redrawn: bool = False) -> float | None:
            looks[len(self.records)] += 1
            return super().probe()

        def train(self, batch: Tensor) -> None:
            self.factor = math.nan if self.step in bad else 1.0
            super().train(batch)

        def loss(self) -> torch.Tensor:
            return super().loss() * self.factor

    bad = set(range(20, 160, 10))
    limits = replace(Thresholds().decision.evidence, known_batches=known)
    loop = Looks(thresholds=replace(Thresholds(), decision=replace(Thresholds().decision, evidence=limits)))
    loop.run(160)
    assert remedies(loop) == [("skip",)] * len(bad)
    assert looks == {n: 3 for n in range(len(bad)) if n <= known or n & (n - 1) == 0}


def test_a_state_is_worse_where_the_newest_batches_fare_worse() -> None:
    """By a clear difference; nobody asks among ranks, while observing, or where nothing finite may be tried."""
    for options, answers in (
        ({"settings": EVIDENCE}, [True, False, False]),
        ({"settings": Settings()}, [False] * 3),
        ({"settings": replace(EVIDENCE, observe=True)}, [False] * 3),
        ({"settings": EVIDENCE, "ranks": memory_ranks(2)[0]}, [False] * 3),
    ):
        loop = PlainLoop(**options)
        monitors, seen = loop.guard.context.monitors, Reading(1, 0, 1.0, 1.0)
        monitors.check(seen)
        monitors.accept(seen)
        loop.batch = torch.randn(8, 3)
        states = {}
        for name, weight in (("good", 0.999), ("as good", 1.0), ("bad", 5.0)):
            loop.net.weight.data.fill_(weight)
            states[name] = capture(loop.guard.context.learner, step=0, global_step=0)
        is_worse = loop.guard._parts.investigator.is_worse
        pairs = [("bad", "good"), ("good", "bad"), ("good", "as good")]
        assert [is_worse(states[one], states[other]) for one, other in pairs] == answers
