"""The newest batches, to be run again."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_nanguard.state.batch_history import BatchHistory, BatchOrigin, row_of, without
from lightning_nanguard.thresholds.batches import (
    BatchesThresholds,
    HealthyBatchesThresholds,
    MicroBatchesThresholds,
    RepeatedStepsThresholds,
)

CPU = torch.device("cpu")


def kept(history: BatchHistory) -> list[int]:
    return [index for _, index in history.healthy]


def test_the_history_knows_the_random_numbers_of_each_batch() -> None:
    """A batch is run again with the numbers it drew, also where nothing was drawn for long before."""
    history = BatchHistory(CPU, updates=8)
    draws = [*range(70), *range(600, 720)]  # none in between, where the state is not copied each time
    for update in range(720):
        history.add(update, update, None)
        history.begin_step()
        drawn = torch.rand(3) if update in draws else None
        history.end_step()
        if drawn is not None:
            (micro,) = history.of(update)
            history.rewind(micro)
            assert torch.equal(torch.rand(3), drawn), update


@pytest.mark.parametrize(("updates", "left"), [(1, [3]), (2, [2, 3])])
def test_the_last_updates_are_kept(updates: int, left: list[int]) -> None:
    """Micro-batches belong to their update; the newest are given in order."""
    history = BatchHistory(CPU, updates=updates)
    for update in (1, 2, 3):
        for micro in range(2):
            history.add(update, 10 * update + micro, torch.zeros(9, 1))
    assert sorted({one.update for one in history.since(-1)}) == left
    assert [one.index for one in history.of(3)] == [30, 31]
    assert [one.index for one in history.newest()] == [30, 31]
    assert history.of(0) == []
    history.clear()
    assert bool(history.newest()) is (updates > 1)


def test_an_update_of_many_micro_batches_keeps_the_newest() -> None:
    """More than eight would hold memory for nothing."""
    history = BatchHistory(CPU)
    for index in range(20):
        history.add(1, index, None)
    assert [one.index for one in history.of(1)] == list(range(12, 20))


def test_of_small_batches_more_are_kept() -> None:
    """Where a batch holds up to four samples, few batches would say little; else none more are kept."""
    for samples, updates in ((4, 20), (5, 8)):
        history = BatchHistory(CPU, updates=8, updates_small=256)
        for update in range(20):
            history.add(update, update, {"x": torch.zeros(samples, 2), "weight": torch.tensor(1.0)})
        assert len(history.since(-1)) == updates


def test_four_healthy_batches_are_kept() -> None:
    """A batch is kept once, the newest four stay, and a look at an update that is gone keeps nothing."""
    history = BatchHistory(CPU, updates=2)
    for index in range(6):
        batch = torch.full((2,), float(index))
        history.add(index, index, batch)
        history.accept(batch, index)
        history.accept(batch, index)
    assert kept(history) == [2, 3, 4, 5]
    history = BatchHistory(CPU, updates=2)
    for index in range(1, 4):
        history.add(index, index, torch.full((2,), float(index)))
    history.accept_update(1)
    assert kept(history) == []
    history.accept_update(2)
    history.accept_update(3)
    assert kept(history) == [2, 3]


def test_healthy_batches_take_bounded_memory() -> None:
    """Large batches are fewer; their size is measured anew after some of them."""
    limits = BatchesThresholds(
        healthy=HealthyBatchesThresholds(most_bytes=1000), repeated=RepeatedStepsThresholds(measured_every=2)
    )
    history = BatchHistory(CPU, thresholds=limits)
    for index, elements in enumerate((100, 100, 200, 1, 1, 1, 1, 1)):
        history.accept([torch.zeros(elements)], index)
    assert kept(history) == [4, 5, 6, 7]
    history.accept([torch.zeros(100)], 8)
    history.accept([torch.zeros(100)], 9)
    assert kept(history) == [8, 9]
    history.accept([torch.zeros(1000)], 10)
    assert kept(history) == []


def test_a_batch_far_beyond_all_others_is_strange() -> None:
    """It is compared with healthy ones of its structure, of which two are needed; Inf is strange, NaN is not."""
    history = BatchHistory(CPU)
    usual = [torch.ones(3), torch.ones(2, dtype=torch.int64), torch.zeros(2)]
    assert history.strange(usual) is None
    history.accept(usual, 0)
    assert history.strange(usual) is None
    history.accept([usual[0] * 2, *usual[1:]], 1)
    assert history.strange([usual[0] * 200, *usual[1:]]) is False
    assert history.strange([usual[0] * 201, *usual[1:]]) is True
    assert history.strange([usual[0] * math.inf, *usual[1:]]) is True
    assert history.strange([usual[0] * math.nan, *usual[1:]]) is False
    assert history.strange([usual[0], usual[1], torch.full((2,), 1e9)]) is False, "where all are zero nothing is far"
    assert history.strange([usual[0]]) is None, "another structure"
    assert history.strange("nothing to measure") is None


def test_healthy_batches_of_earlier_updates() -> None:
    """Micro-batches of the present window are healthy so far, and say nothing about the rest of it."""
    history = BatchHistory(CPU)
    for update, batch in enumerate("abb"):
        history.add(update // 2, update, batch)
        history.accept(batch, update)
    assert history.healthy_before() == ["a"]


def test_micro_batches_are_capped_in_bytes() -> None:
    """Beside the newest, whose memory the loop holds anyway, as many are kept as the limit allows."""
    limits = replace(
        BatchesThresholds(), micro_batches=replace(MicroBatchesThresholds(), most_bytes=200, per_update=100)
    )
    history = BatchHistory(CPU, updates=4, thresholds=limits)
    for update in range(3):
        for index in range(8):
            history.add(update, index, torch.zeros(10))  # 40 bytes
    assert [micro.index for micro in history.since(-1)] == [2, 3, 4, 5, 6, 7]
    history.withdraw()
    history.add(2, 8, torch.zeros(100))
    history.add(2, 9, torch.zeros(1))
    assert [micro.index for micro in history.since(-1)] == [9], "a batch larger than the limit is not kept"
    assert history.bytes_kept() == 4
    batch = history.newest()[-1].batch
    history.accept(batch, 9)
    assert history.bytes_kept() == 4, "each is counted once"


def test_a_micro_batch_that_was_left_out_is_not_healthy() -> None:
    """A micro-batch that was left out of its update is not kept, whether this is known before or after its end."""
    history = BatchHistory(torch.device("cpu"))
    batches = [torch.full((2,), float(number)) for number in range(4)]
    history.leave_out(batches[0])
    for index, batch in enumerate(batches[:3]):
        history.accept(batch, index)
    history.leave_out(batches[1])
    history.accept(batches[3], 3)
    assert [index for _, index in history.healthy] == [2, 3]


def test_an_earlier_batch() -> None:
    """The newest healthy batch; before one is known, the newest one of an update before the present one."""
    history, one, other = BatchHistory(CPU, updates=3), torch.zeros(2), torch.ones(2)
    assert history.earlier() is None
    history.add(1, 0, one)
    assert history.earlier() is None
    history.add(2, 1, other)
    assert history.earlier() is one
    history.accept_update(2)
    assert history.earlier() is other


def test_batches_are_seen_as_their_steps_began() -> None:
    """What a step removed is there while it is looked at, and also in the healthy batches that are kept."""
    history, batch = BatchHistory(CPU), {"x": torch.ones(2), "labels": torch.zeros(2)}
    history.add(1, 0, batch)
    history.begin_step()
    labels = batch.pop("labels")
    with history.as_begun():
        assert batch["labels"] is labels
        history.accept(batch, 0)
    assert [*batch] == ["x"]
    ((known, _),) = history.healthy
    assert sorted(known) == ["labels", "x"]
    assert [*history.earlier()] == [*known]
    assert history.healthy_before() == []
    history.leave_out(batch)
    assert history.healthy == []
    with history.as_begun():
        batch.pop("labels")  # the step is made again
    assert [*batch] == ["x"]


def test_a_part_of_a_batch_is_restored_too() -> None:
    """If only the good samples are run, their contents count."""
    history, whole, part = BatchHistory(CPU), {"x": torch.ones(2)}, {"x": torch.ones(1)}
    history.add(1, 0, whole)
    history.begin_step()
    history.exchange(whole, part, BatchOrigin(0))
    part.clear()
    with history.as_begun():
        assert [*part] == ["x"]
        history.accept(whole, 0)
    assert [*part] == []
    assert [sorted(one) for one, _ in history.healthy] == [["x"]]


def test_rows_of_keys() -> None:
    """Integers of any kind are rows; what else a sampler draws is named in words."""
    assert [row_of(key) for key in (3, np.int64(4), torch.tensor(5), "a/b.png")] == [3, 4, 5, "a/b.png"]


def test_others_keep_their_order() -> None:
    """What is left out leaves the order of the others as it is."""
    assert without([5, 2, 9, 2, 1], {2, 7}) == [5, 9, 1]
