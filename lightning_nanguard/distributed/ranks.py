"""All processes of a run as seen from one of them, and what they agree on together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Protocol, final

from torch import Tensor

from lightning_nanguard.distributed.report import Report
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.types import Finding


class PendingReports(Protocol):
    """The reports of all ranks on one update, some of which may not have arrived."""

    def reports(self) -> Sequence[Report]:
        """The reports in the order of ranks; waits for ranks that have not posted theirs."""


class Ranks(Protocol):
    """All processes of a run, as seen from one of them.

    Attributes:
        rank: Number of this process.
        world: Number of processes.
        sharded: Whether each rank holds a shard of the parameters; else all ranks hold the same parameters.
        snapshot_parts: Number of ranks on this node that keep one snapshot together.
        sharers: Number of ranks on this node, which share its memory.
    """

    rank: int
    world: int
    sharded: bool
    snapshot_parts: int
    sharers: int

    def post(self, report: Report) -> PendingReports:
        """Send a report to all ranks, without waiting. Every rank posts the same number of reports."""

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks (numbers, strings, ``None`` and lists of them), in order; all ranks must call it."""

    def split_snapshot(self, snapshot: Snapshot) -> Snapshot:
        """A copy of a snapshot that is equal on all ranks, which holds this rank's part only."""

    def join_snapshot(self, snapshot: Snapshot) -> Snapshot:
        """The inverse of :meth:`split_snapshot`; all ranks must call it."""

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their mean over ranks, in place; all ranks must call it."""

    def leave(self) -> None:
        """Stop waiting for other ranks, because this one has raised."""

    def close(self) -> None:
        """Release what was opened for the run."""


@final
class SingleProcess:
    """The only process of a run.

    Args:
        sharded: Whether the strategy keeps parameters as it would among several processes.
    """

    rank = 0
    world = 1
    snapshot_parts = 1
    sharers = 1

    def __init__(self, *, sharded: bool = False) -> None:
        self.sharded = sharded

    def post(self, report: Report) -> PendingReports:
        """Not possible."""
        raise RuntimeError("a run of one process has no other rank to report to")

    def gather(self, value: Any) -> list[Any]:
        """The value of this process."""
        return [value]

    def split_snapshot(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot itself."""
        return snapshot

    def join_snapshot(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot itself."""
        return snapshot

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Nothing to do."""

    def leave(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


def mean_over_ranks(ranks: Ranks, value: float | None) -> float | None:
    """Mean over ranks, ``None`` if one of them has no value; all ranks must call it."""
    values = ranks.gather(value)
    return None if any(one is None for one in values) else sum(one / len(values) for one in values)


def first_over_ranks(ranks: Ranks, value: str | None) -> tuple[str | None, tuple[int, ...]]:
    """The value of the lowest rank that has one, and the ranks that have one unless all do; all ranks must call it."""
    values = ranks.gather(value)
    having = tuple(rank for rank, one in enumerate(values) if one is not None)
    return (values[having[0]] if having else None), (having if len(having) < len(values) else ())


def most_confident_over_ranks(ranks: Ranks, finding: Finding | None) -> Finding | None:
    """The finding with the highest confidence, among equals one that names samples; all ranks must call it."""
    if ranks.world == 1:
        return finding
    mine = None if finding is None else {field.name: getattr(finding, field.name) for field in fields(Finding)}
    if mine is not None:
        mine["evidence"] = dict(mine["evidence"])
    found = [one for one in ranks.gather(mine) if one is not None]
    if not found:
        return None
    best = max(found, key=lambda one: (float(one["confidence"]), bool(one["samples"])))
    return Finding(**{**best, "samples": tuple(best["samples"]), "rows": tuple(best["rows"])})
