"""The ranks of ``torch.distributed``'s default group."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_nanguard.distributed.ranks import PendingReports, is_replicated
from lightning_nanguard.distributed.report import Report
from lightning_nanguard.distributed.sockets import connect
from lightning_nanguard.state.learner import StateKey
from lightning_nanguard.state.snapshot import Share, Snapshot
from lightning_nanguard.thresholds import DistributedThresholds

_HOST = torch.device("cpu")  # whatever device the user has made the default


@final
class Group:
    """The ranks of ``torch.distributed``'s default group, for a guard in each of them.

    On one machine reports are sent over sockets (:mod:`lightning_nanguard.distributed.sockets`), else by an
    asynchronous all-reduce. All collectives except :meth:`average` run over gloo groups of the guard. So they cannot be
    confused with those of the trainer or the user, and wait for no device. All ranks must construct a group at the same
    point of the run.

    Args:
        sharded: Whether each rank holds a shard of the parameters; else all ranks hold the same parameters.
        node: Name of the machine. Ranks of the same name store snapshots together.
        thresholds: How long ranks wait, and which tensors they split.

    Raises:
        RuntimeError: If this build of ``torch.distributed`` has no gloo.
    """

    def __init__(
        self,
        *,
        sharded: bool = False,
        node: str | None = None,
        thresholds: DistributedThresholds = DistributedThresholds(),
    ) -> None:
        if not dist.is_gloo_available():
            raise RuntimeError(
                "NaNGuard needs gloo to communicate between ranks, and this build of torch.distributed has none. Use a "
                "build with gloo, or train without the guard."
            )
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self.sharded = sharded
        self._thresholds = thresholds
        self._left = False
        self._group: Any = dist.new_group(backend="gloo")
        nodes = self.gather(socket.gethostname() if node is None else node)
        mine = nodes[self.rank]
        self._node_group: Any = self._group
        if len(set(nodes)) > 1:
            for name in dict.fromkeys(nodes):
                # torch requires that every rank makes every group.
                group = dist.new_group([rank for rank, other in enumerate(nodes) if other == name], backend="gloo")
                if name == mine:
                    self._node_group = group
        self._channel = connect(self.rank, self.gather, thresholds) if len(set(nodes)) == 1 else None
        self.sharers = nodes.count(mine)
        self.snapshot_parts = 1 if sharded else self.sharers
        self._node_rank = nodes[: self.rank].count(mine)

    def post(self, report: Report) -> PendingReports:
        """Send a report to all ranks, without waiting."""
        data = report.pack()
        if self._channel is not None:
            read: Callable[[], list[bytes]] = partial(self._channel.read, self._channel.post(data))
        else:
            read = self._post_to_group(data)
        return cache(lambda: tuple(map(Report.unpack, read())))

    def _post_to_group(self, data: bytes) -> Callable[[], list[bytes]]:
        """Send a report by an all-reduce among all ranks; return a function that waits for the reports of all ranks."""
        # Each rank fills only its own row, so the sum is exact for any bits.
        rows = torch.zeros(self.world, len(data) // 8, dtype=torch.int64, device=_HOST)
        rows[self.rank] = torch.frombuffer(bytearray(data), dtype=torch.int64)
        # Hide the all-reduce from profilers: torch 2.13 crashes if a user's profiler stops while one that it has
        # recorded is running.
        torch._C._autograd._enable_record_function(False)
        try:
            work: Any = dist.all_reduce(rows, group=self._group, async_op=True)
        finally:
            torch._C._autograd._enable_record_function(True)

        def read() -> list[bytes]:
            work.wait()
            return [row.tobytes() for row in rows.numpy()]

        return read

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks. After :meth:`leave`, only the value of this rank."""
        if self._left:
            return [value]
        data = json.dumps(value).encode()
        sizes = torch.zeros(self.world, dtype=torch.int64, device=_HOST)
        sizes[self.rank] = len(data)
        dist.all_reduce(sizes, group=self._group)
        table = torch.zeros(self.world, int(sizes.max()), dtype=torch.uint8, device=_HOST)
        table[self.rank, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.all_reduce(table, group=self._group)
        rows = zip(table, sizes.tolist(), strict=True)
        return [json.loads(row[:size].numpy().tobytes()) for row, size in rows]

    def split_snapshot(self, snapshot: Snapshot) -> Snapshot:
        """A copy of the snapshot with only this rank's part of each large parameter and moment. The rest is whole."""
        return replace(snapshot, leaves={key: self._split(key, leaf) for key, leaf in snapshot.leaves.items()})

    def _split(self, key: StateKey, leaf: Any) -> Any:
        if not is_replicated(key, leaf) or leaf.nbytes < self._thresholds.min_split_bytes:
            return leaf.clone() if isinstance(leaf, Tensor) else leaf
        data = leaf.contiguous().view(-1).view(torch.uint8)
        size = -(-leaf.nbytes // self.snapshot_parts)
        part = torch.zeros(size, dtype=torch.uint8, device=leaf.device)
        mine = data[self._node_rank * size : (self._node_rank + 1) * size]
        part[: len(mine)] = mine
        return Share(part, leaf.shape, leaf.dtype)

    def join_snapshot(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with every tensor whole. After :meth:`leave` a split snapshot cannot be joined."""
        shares = {key: leaf for key, leaf in snapshot.leaves.items() if isinstance(leaf, Share)}
        if not shares:
            return snapshot
        if self._left:
            raise RuntimeError("the last good state is split among ranks, and this rank can no longer reach the others")
        return replace(
            snapshot, leaves={**snapshot.leaves, **{key: self._join(share) for key, share in shares.items()}}
        )

    def _join(self, share: Share) -> Tensor:
        part = share.part.cpu()
        parts = [torch.empty_like(part) for _ in range(self.snapshot_parts)]
        dist.all_gather(parts, part, group=self._node_group)
        count = math.prod(share.shape) * share.dtype.itemsize
        return torch.cat(parts)[:count].view(share.dtype).view(share.shape).to(share.part.device)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their mean over ranks, in place."""
        # The default group supports the tensors' device, and the trainer has no collective in flight at this point.
        with torch.no_grad():
            for tensor in tensors:
                dist.all_reduce(tensor.div_(self.world))

    def leave(self) -> None:
        """Stop waiting for other ranks."""
        self._left = True
        self._close_channel()

    def close(self) -> None:
        """Close the sockets and destroy the gloo groups."""
        self._close_channel()
        if dist.is_initialized() and not self._left:
            for group in {id(group): group for group in (self._node_group, self._group)}.values():
                dist.destroy_process_group(group)
        self._left = True

    def _close_channel(self) -> None:
        if self._channel is not None:
            self._channel.close()
