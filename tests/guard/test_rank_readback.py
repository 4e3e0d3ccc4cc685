"""Readings of several processes: two guards in two threads, each in a loop of its own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_nanguard import Fault
from lightning_nanguard.guard.context import Settings
from tests.guard.memory_ranks import MemoryRanks, memory_ranks, on_all
from tests.guard.plain_loop import PlainLoop, is_finite, nan_at, remedies, state
from tests.helpers import copied, differences


class RankLoop(PlainLoop):
    """One rank's loop: it has batches of its own, and takes the mean gradient of all ranks.

    Args:
        ranks: All ranks, as seen from this one.
        deferred: Whether readings may be late.
        options: For the plain loop.
    """

    def __init__(self, ranks: MemoryRanks, *, deferred: bool = False, **options: Any) -> None:
        torch.manual_seed(0)
        super().__init__(ranks=ranks, settings=Settings(snapshot_every=4, deferred=deferred), **options)
        self.ranks = ranks
        self.bad_loss: int | None = None
        self.bad_gradient: int | None = None
        for parameter in self.net.parameters():
            parameter.register_post_accumulate_grad_hook(self._average)

    def _average(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.ranks.average([parameter.grad])
        if self.step == self.bad_gradient:
            parameter.grad.fill_(math.nan)

    def train(self, batch: Tensor) -> None:
        super().train(batch + 0.1 * self.ranks.rank)

    def loss(self) -> Tensor:
        # Its value alone becomes NaN, its gradient stays as it is.
        return super().loss() + (math.nan if self.step == self.bad_loss else 0.0)

    def probe(self, *, redrawn: bool = False) -> float | None:
        return sum(self.ranks.gather(super().probe())) / self.ranks.world


def loops(**options: Any) -> list[RankLoop]:
    return [RankLoop(ranks, **options) for ranks in memory_ranks(2)]


def run(pair: list[RankLoop], batches: int, bad: int | None = None) -> None:
    """Train both ranks; rank 1 meets one bad batch."""
    spoils = [nan_at(), nan_at() if bad is None else nan_at(bad)]
    on_all([one.ranks for one in pair], lambda rank: pair[rank].run(batches, spoils[rank]))


def assert_agreed(pair: list[RankLoop]) -> None:
    """Both did the same for the same reason, and hold the same finite learner."""
    records = [[record.to_dict() for record in one.records] for one in pair]
    assert records[0] == records[1]
    states = [copied(state(one)) for one in pair]
    assert differences(*states) == []
    assert all(map(is_finite, pair))


def test_a_healthy_run_is_the_same_with_a_guard() -> None:
    """On both ranks bit by bit."""
    ends = []
    for guarded in (False, True):
        pair = loops()
        if not guarded:
            for one in pair:
                for call in ("start", "open_batch", "see_loss", "before_step", "close_batch", "flush"):
                    setattr(one.guard, call, lambda *_: None)
        run(pair, 20)
        assert_agreed(pair)
        assert pair[0].records == []
        ends.append(copied(state(pair[1])))
    assert differences(*ends) == []


@pytest.mark.parametrize(
    ("options", "done"),
    [({}, "skip"), ({"deferred": True}, "restore"), ({"deferred": True, "fused": True}, "skip")],
    ids=["step", "deferred", "deferred and fused"],
)
@pytest.mark.usefixtures("late")
def test_a_bad_batch_of_one_rank_is_bad_for_all(options: dict[str, Any], done: str) -> None:
    """Its gradient reaches every rank, so all see it: they skip it before the step, on the device, or undo it. The rank
    that brought it is named."""
    pair = loops(**options)
    run(pair, 24, bad=12)
    assert_agreed(pair)
    assert remedies(pair[0]) == [(done,)]
    assert pair[0].records[0].ranks == (1,)


def test_a_loss_that_one_rank_alone_sees_is_heard_with_the_next_update() -> None:
    """Its update was made by then, so all ranks go back together."""
    pair = loops()
    pair[1].bad_loss = 12
    run(pair, 24)
    assert_agreed(pair)
    assert remedies(pair[0]) == [("restore",)]
    assert (pair[0].records[0].fault, pair[0].records[0].ranks) == ("non_finite_loss", (1,))


def test_a_gradient_that_is_bad_on_one_rank_alone_does_not_part_them() -> None:
    """That rank keeps it from its weights, the other makes its update; all hear of it and go back together."""
    pair = loops()
    pair[0].bad_gradient = 12
    run(pair, 24)
    assert_agreed(pair)
    assert remedies(pair[1]) == [("restore",)]
    assert pair[1].records[0].ranks == (0,)


def test_a_fault_outside_a_step_is_told_with_the_next_update() -> None:
    """Only one rank saw it, as in its part of the validation data: until the next update it is not acted on, then by
    all."""
    pair = loops()
    run(pair, 12)
    pair[1].guard.report(Fault("mine", "state", "val_loss", message="a bad validation loss", only_if_corrupt=True))
    assert pair[1].records == []
    run(pair, 3)
    assert_agreed(pair)
    assert [(one.fault, one.place, one.remedies, one.ranks) for one in pair[0].records] == [
        ("mine", "val_loss", (), (1,))
    ]


def test_the_reading_that_all_judge_is_the_mean() -> None:
    """Both have the same history: the mean loss, and the norm of the gradient that all hold."""
    pair = loops()
    run(pair, 8)
    histories = [one.guard.context.monitors.history(0).state_dict() for one in pair]
    assert histories[0] == histories[1]
    assert len(histories[0]["losses"]) == 8
    alone = PlainLoop()
    alone.net.load_state_dict(RankLoop(memory_ranks(1)[0]).net.state_dict())
    draw = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    losses = []
    for rank in (0, 1):
        alone.batch = draw + 0.1 * rank
        losses.append(alone.probe())
    assert histories[0]["losses"][0][1] == pytest.approx(sum(losses) / 2)


def test_a_rank_that_raised_waits_for_none() -> None:
    """What it still had to hear is forgotten, and a look at its state ends without the others."""
    pair = loops()
    run(pair, 12)
    pair[1].train = lambda batch: None
    on_all([pair[0].ranks], lambda rank: pair[0].guard.leave())
    assert pair[0].ranks.parted
    assert list(pair[0].guard._parts.readback.flush()) == []


def test_a_state_that_is_bad_on_one_rank_leads_all_back() -> None:
    """Also amid a batch: no rank takes its own good state for that of all."""
    pair = loops()
    run(pair, 20)

    def look(rank: int) -> None:
        pair[rank].guard.open_batch()
        if rank == 1:
            with torch.no_grad():
                next(pair[rank].net.parameters()).fill_(math.nan)
        pair[rank].guard.check()

    on_all([one.ranks for one in pair], look)
    assert_agreed(pair)
    assert [(record.fault, record.ranks) for record in pair[0].records] == [("corrupted_state", (1,))]
