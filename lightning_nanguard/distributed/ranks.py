"""All processes of a run, as seen from one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Protocol, final

from torch import Tensor

from lightning_nanguard.distributed.report import Report
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.types import Finding


class Posted(Protocol):
    """Reports on their way."""

    def reports(self) -> Sequence[Report]:
        """Those of all ranks, in their order; waits for ranks that have not posted yet."""


class Ranks(Protocol):
    """All processes of a run, as seen from one of them."""

    rank: int
    world: int
    sharded: bool
    sharers: int
    """How many processes of this node keep one snapshot together."""

    def post(self, report: Report) -> Posted:
        """Tell the others, without waiting."""

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value (of plain numbers, words and lists), in the order of ranks; all must call it."""

    def share(self, snapshot: Snapshot) -> Snapshot:
        """A copy of a snapshot that is equal on all ranks, of which this one keeps its part."""

    def whole(self, snapshot: Snapshot) -> Snapshot:
        """The inverse of :meth:`share`; all must call it."""

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Mean over ranks, in place; all must call it."""

    def part(self) -> None:
        """This rank is on its own from now on (it has raised): nothing waits for the others any more."""

    def close(self) -> None:
        """The run is over."""


@final
class Alone:
    """One process.

    Args:
        sharded: Whether a strategy keeps the parameters as it would among several.
    """

    rank = 0
    world = 1
    sharers = 1

    def __init__(self, *, sharded: bool = False) -> None:
        self.sharded = sharded

    def post(self, report: Report) -> Posted:
        """Nobody listens."""
        raise RuntimeError("a single process has nobody to report to")

    def gather(self, value: Any) -> list[Any]:
        """Its own value."""
        return [value]

    def share(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot itself."""
        return snapshot

    def whole(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot itself."""
        return snapshot

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Nothing to do."""

    def part(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


def mean(ranks: Ranks, value: float | None) -> float | None:
    """Mean over ranks, ``None`` where one of them has no value; all must call it."""
    values = ranks.gather(value)
    return None if any(one is None for one in values) else sum(one / len(values) for one in values)


def first(ranks: Ranks, value: str | None) -> tuple[str | None, tuple[int, ...]]:
    """The value of the lowest rank that has one, and which ranks have one; all must call it."""
    values = ranks.gather(value)
    having = tuple(rank for rank, one in enumerate(values) if one is not None)
    return (values[having[0]] if having else None), (having if len(having) < len(values) else ())


def surest(ranks: Ranks, finding: Finding | None) -> Finding | None:
    """The finding with the highest confidence, among equals one that names samples; all must call it."""
    if ranks.world == 1:
        return finding
    told = None if finding is None else {f.name: getattr(finding, f.name) for f in fields(Finding)}
    if told is not None:
        told["evidence"] = dict(told["evidence"])
    found = [one for one in ranks.gather(told) if one is not None]
    if not found:
        return None
    best = max(found, key=lambda one: (float(one["confidence"]), bool(one["samples"])))
    return Finding(**{**best, "samples": tuple(best["samples"])})
