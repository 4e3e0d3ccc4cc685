"""The interface through which one rank sees all ranks of a run, and functions by which they agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol, final

from torch import Tensor

from lightning_nanguard.distributed.report import Report
from lightning_nanguard.measure.checksum import checksum
from lightning_nanguard.measure.tensors import is_strided, local
from lightning_nanguard.state.learner import StateKey
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.types import Finding

PendingReports = Callable[[], Sequence[Report]]
"""Gives the reports of all ranks about one update, in order. Waits for ranks that have not posted theirs."""


class Ranks(Protocol):
    """All processes of a run, as seen from one of them.

    What is not overridden is as with a single process.

    Attributes:
        rank: Number of this process.
        world: Number of processes.
        sharded: Whether each rank holds a shard of the parameters; else all ranks hold the same parameters.
        snapshot_parts: Number of ranks on this node that store one snapshot together.
        sharers: Number of ranks on this node, which share its host memory.
    """

    rank: int = 0
    world: int = 1
    sharded: bool = False
    snapshot_parts: int = 1
    sharers: int = 1

    def post(self, report: Report) -> PendingReports:
        """Send a report to all ranks, without waiting. Every rank must post the same number of reports."""
        raise RuntimeError("a run of one process has no other rank to report to")

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks in order: numbers, strings, ``None`` and lists of them. All ranks must call it."""
        return [value]

    def split_snapshot(self, snapshot: Snapshot) -> Snapshot:
        """A copy, with this rank's part only, of a snapshot that is equal on all ranks."""
        return snapshot

    def join_snapshot(self, snapshot: Snapshot) -> Snapshot:
        """The inverse of :meth:`split_snapshot`. All ranks must call it."""
        return snapshot

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their mean over ranks, in place. All ranks must call it."""
        return

    def leave(self) -> None:
        """Stop waiting for other ranks, because this one has raised an exception."""
        return

    def close(self) -> None:
        """Release sockets and groups that were opened for the run."""
        return


@final
class SingleProcess(Ranks):
    """The ranks of a run with a single process.

    Args:
        sharded: Whether the strategy keeps parameters in the same way as with several ranks.
    """

    def __init__(self, *, sharded: bool = False) -> None:
        self.sharded = sharded


def mean_over_ranks(ranks: Ranks, value: float | None) -> float | None:
    """Mean over ranks; ``None`` if one of them has no value. All ranks must call it."""
    values = ranks.gather(value)
    return None if any(one is None for one in values) else sum(one / len(values) for one in values)


def first_over_ranks(ranks: Ranks, value: str | None) -> tuple[str | None, tuple[int, ...]]:
    """The value of the lowest rank that has one, and the ranks that have one, unless all do. All ranks must call it."""
    values = ranks.gather(value)
    having = tuple(rank for rank, one in enumerate(values) if one is not None)
    return (values[having[0]] if having else None), (having if len(having) < len(values) else ())


def most_confident_over_ranks(ranks: Ranks, finding: Finding | None) -> Finding | None:
    """The finding with the highest confidence. Among equals, one that names samples. All ranks must call it."""
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


def is_replicated(key: StateKey, leaf: Any) -> bool:
    """Whether every rank should hold the same value: parameters and moments, but not buffers and averaged copies."""
    return key[0] in ("parameter", "optimizer") and isinstance(leaf, Tensor) and is_strided(local(leaf))


def checksums(leaves: Mapping[StateKey, Any]) -> tuple[int, int]:
    """Checksums of all parameters, and of all optimizer state. Each one reads once from each device."""
    replicated = [(key, leaf) for key, leaf in leaves.items() if is_replicated(key, leaf)]
    return (
        checksum(leaf for key, leaf in replicated if key[0] == "parameter"),
        checksum(leaf for key, leaf in replicated if key[0] == "optimizer"),
    )
