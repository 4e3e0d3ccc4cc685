"""Ranks that are threads of one process: what they tell each other goes through memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Condition
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_nanguard.distributed.report import Report
from lightning_nanguard.state.snapshot import Snapshot

_T = TypeVar("_T")


class Board:
    """Where ranks put values, under a key, and wait until all have done so.

    Args:
        world: Number of ranks.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self._values: defaultdict[tuple[str, int], dict[int, Any]] = defaultdict(dict)
        self._changed = Condition()

    def put(self, key: tuple[str, int], rank: int, value: Any) -> None:
        with self._changed:
            self._values[key][rank] = value
            self._changed.notify_all()

    def complete(self, key: tuple[str, int]) -> bool:
        return len(self._values[key]) == self.world

    def get(self, key: tuple[str, int]) -> list[Any]:
        with self._changed:
            assert self._changed.wait_for(lambda: self.complete(key), timeout=20), f"a rank never came to {key}"
            return [self._values[key][rank] for rank in range(self.world)]


class MemoryRanks:
    """One of several ranks.

    Args:
        rank: Its number.
        board: Where all ranks put what they tell.
    """

    sharded = False
    snapshot_parts = 1
    sharers = 1

    def __init__(self, rank: int, board: Board) -> None:
        self.rank = rank
        self.world = board.world
        self.parted = False
        self._board = board
        self._posted = 0
        self._gathered = 0

    def post(self, report: Report) -> Callable[[], Sequence[Report]]:
        self._posted += 1
        key = ("report", self._posted)
        self._board.put(key, self.rank, report)
        return partial(self._board.get, key)

    def gather(self, value: Any) -> list[Any]:
        self._gathered += 1
        key = ("value", self._gathered)
        self._board.put(key, self.rank, value)
        return self._board.get(key)

    def average(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            tensor.copy_(torch.stack(self.gather(tensor.clone())).mean(0))

    def split_snapshot(self, snapshot: Snapshot) -> Snapshot:
        return snapshot

    def join_snapshot(self, snapshot: Snapshot) -> Snapshot:
        return snapshot

    def leave(self) -> None:
        self.parted = True

    def close(self) -> None:
        pass


def memory_ranks(world: int) -> list[MemoryRanks]:
    """All ranks of a run."""
    board = Board(world)
    return [MemoryRanks(rank, board) for rank in range(world)]


def on_all(ranks: Sequence[MemoryRanks], act: Callable[[int], _T]) -> list[_T]:
    """What each rank gives that acts in a thread of its own; raises what one of them raises."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(act, range(len(ranks))))
