"""What ranks tell each other of their snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_nanguard.distributed.ranks import PendingReports
from lightning_nanguard.distributed.report import Report
from lightning_nanguard.guard.snapshot_agreement import SnapshotAgreement
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.types import Fault

OBJECTION = Fault("implausible_state", "state", "parameter w", None, "w is far out", rate_may_cause=True)


class ThreeRanks:
    """Three ranks as seen from the first; what the two others say when values are gathered is given."""

    rank, world, snapshot_parts, sharers = 0, 3, 3, 3

    def __init__(self, *others: Any, sharded: bool = False) -> None:
        self.others = others
        self.sharded = sharded

    def gather(self, value: Any) -> list[Any]:
        return [value, *self.others]

    def post(self, report: Report) -> PendingReports:
        raise NotImplementedError

    def split_snapshot(self, snapshot: Snapshot) -> Snapshot:
        return snapshot

    def join_snapshot(self, snapshot: Snapshot) -> Snapshot:
        return snapshot

    def average(self, tensors: Sequence[Tensor]) -> None:
        raise NotImplementedError

    def leave(self) -> None: ...

    def close(self) -> None: ...


def report(interval: int = 16, judged: int = 5, objects: bool = False, parameters: int = 1, moments: int = 1) -> Report:
    return Report(1.0, 1.0, 0.0, 9, True, True, True, False, False, interval, judged, objects, parameters, moments)


def snapshot(value: float = 1.0) -> Snapshot:
    return Snapshot(5, 50, {("parameter", "w"): torch.full((4,), value), ("optimizer", 0, "w", "m"): torch.ones(4)})


def test_what_is_told_of_a_snapshot() -> None:
    """Its step, whether this rank objects, and checksums, which are equal where the bits are."""
    one, other, sharded = (SnapshotAgreement(ThreeRanks(sharded=sharded), 16) for sharded in (False, False, True))
    assert one.tell() == (-1, False, 0, 0)
    one.judge(snapshot(), snapshot().leaves, None)
    other.judge(snapshot(2.0), snapshot(2.0).leaves, OBJECTION)
    sharded.judge(snapshot(), snapshot().leaves, None)
    step, objects, parameters, moments = one.tell()
    assert (step, objects) == (5, False)
    assert other.tell()[:2] == (5, True)
    assert other.tell()[2] != parameters
    assert other.tell()[3] == moments != 0
    assert sharded.tell() == (5, False, 0, 0), "shards differ from rank to rank"


def test_the_longest_interval_holds() -> None:
    """All ranks take snapshots at the same updates."""
    agreement = SnapshotAgreement(ThreeRanks(), 16)
    assert agreement.hear([report(16), report(64), report(32)])
    assert agreement.interval == 64
    assert not agreement.hear([report(64), report(16), report(16)])


def test_a_snapshot_is_judged_when_all_ranks_have_looked_at_it() -> None:
    """A rank that has judged an older one only is waited for."""
    agreement = SnapshotAgreement(ThreeRanks(), 16)
    agreement.hear([report(), report(judged=2), report()])
    assert not agreement.judged(snapshot())
    agreement.hear([report(), report(), report()])
    assert agreement.judged(snapshot())


def test_all_ranks_take_the_objection_of_the_first_that_has_one() -> None:
    """It arrives with all its traits, and with the ranks that object."""
    theirs = {"kind": "implausible_state", "scope": "state", "place": "parameter w", "message": "w is far out"}
    agreement = SnapshotAgreement(ThreeRanks({**theirs, "rate_may_cause": True}, None), 16)
    agreement.hear([report(), report(objects=True), report()])
    assert agreement.objection(snapshot()) == (OBJECTION, (1,))
    agreement = SnapshotAgreement(ThreeRanks(None, None), 16)
    agreement.judge(snapshot(), snapshot().leaves, OBJECTION)
    agreement.hear([report(objects=True), report(), report()])
    assert agreement.objection(snapshot()) == (OBJECTION, (0,))


def test_ranks_that_part_go_back_once(caplog: pytest.LogCaptureFixture) -> None:
    """Ranks that were equal and differ are at fault; those that differ again are left alone, and keep their own."""
    agreement = SnapshotAgreement(ThreeRanks(), 16)
    equal, parted = [report()] * 3, [report(), report(parameters=7), report()]
    found = []
    for reports in (parted, equal, parted, equal, parted):
        agreement.hear(reports)
        fault, ranks = agreement.objection(snapshot())
        found.append((None if fault is None else f"{fault.kind}: {fault.place}", ranks, agreement.share()))
    assert found == [
        (None, (), False),
        (None, (), True),
        ("parted_ranks: parameters", (1,), False),
        (None, (), True),
        (None, (), False),
    ]
    assert caplog.text.count("the parameters of the ranks differ again at step 50") == 1


def test_shards_are_never_compared() -> None:
    """Each rank holds another part of the state, and keeps it whole."""
    agreement = SnapshotAgreement(ThreeRanks(sharded=True), 16)
    agreement.hear([report(), report(parameters=7), report()])
    assert agreement.objection(snapshot()) == (None, ())
    assert not agreement.share()
