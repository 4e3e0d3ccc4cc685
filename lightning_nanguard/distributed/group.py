"""The ranks of ``torch.distributed``'s default group."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_nanguard.distributed.checksum import replicated
from lightning_nanguard.distributed.ranks import Posted
from lightning_nanguard.distributed.report import Report
from lightning_nanguard.distributed.sockets import connect
from lightning_nanguard.state.snapshot import Share, Snapshot


@final
class _Underway:
    __slots__ = ("_read", "_reports")

    def __init__(self, read: Callable[[], Sequence[bytes]]) -> None:
        self._read = read
        self._reports: tuple[Report, ...] = ()

    def reports(self) -> Sequence[Report]:
        if not self._reports:
            self._reports = tuple(map(Report.unpack, self._read()))
        return self._reports


# Tensors below this many bytes are kept whole: a gather of their own would cost more than they do.
_WORTH_SHARING = 1024


@final
class Group:
    """The ranks of ``torch.distributed``'s default group. All of them must make it at the same moment.

    On one machine reports travel over sockets (see :mod:`lightning_nanguard.distributed.sockets`), else by an
    asynchronous all-reduce over a gloo group of their own. They never mix with the collectives of the trainer or the
    user, and need no
    synchronisation of a device.

    Args:
        sharded: Whether each rank holds a shard of the parameters; else all hold the same.
        node: Name of the machine; ranks of one name keep one snapshot together.

    Raises:
        RuntimeError: When there is no gloo.
    """

    def __init__(self, *, sharded: bool = False, node: str | None = None) -> None:
        if not dist.is_gloo_available():
            raise RuntimeError(
                "NaNGuard needs gloo for the ranks to agree, and this build of torch.distributed has none. Take a "
                "build with gloo, or train without the guard."
            )
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self.sharded = sharded
        self._parted = False
        self._group: Any = dist.new_group(backend="gloo")
        nodes = self.gather(socket.gethostname() if node is None else node)
        self._own: Any = self._group
        if len(set(nodes)) > 1:
            for name in dict.fromkeys(nodes):
                # Every rank must make every group.
                group = dist.new_group([rank for rank, other in enumerate(nodes) if other == name], backend="gloo")
                if name == nodes[self.rank]:
                    self._own = group
        self._lines = connect(self.rank, self.gather) if len(set(nodes)) == 1 else None
        self.sharers = 1 if sharded else nodes.count(nodes[self.rank])
        self._place = nodes[: self.rank].count(nodes[self.rank])

    def post(self, report: Report) -> Posted:
        """Tell the others, without waiting."""
        data = report.pack()
        if self._lines is not None:
            return _Underway(partial(self._lines.read, self._lines.post(data)))
        # A sum in which each rank has a row to itself: exact for any bits, equal on all, and it says who said what.
        rows = torch.zeros(self.world, len(data) // 8, dtype=torch.int64)
        rows[self.rank] = torch.frombuffer(bytearray(data), dtype=torch.int64)
        work: Any = dist.all_reduce(rows, group=self._group, async_op=True)

        def read() -> list[bytes]:
            work.wait()
            return [row.tobytes() for row in rows.numpy()]

        return _Underway(read)

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value; only one's own after :meth:`part`."""
        if self._parted:
            return [value]
        data = json.dumps(value).encode()
        sizes = torch.zeros(self.world, dtype=torch.int64)
        sizes[self.rank] = len(data)
        dist.all_reduce(sizes, group=self._group)
        letters = torch.zeros(self.world, int(sizes.max()), dtype=torch.uint8)
        letters[self.rank, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.all_reduce(letters, group=self._group)
        rows = zip(letters, sizes.tolist(), strict=True)
        return [json.loads(row[:size].numpy().tobytes()) for row, size in rows]

    def share(self, snapshot: Snapshot) -> Snapshot:
        """A copy of the snapshot that holds this rank's part of each large parameter and moment, and all else whole."""
        return replace(snapshot, leaves={path: self._kept(path, leaf) for path, leaf in snapshot.leaves.items()})

    def _kept(self, path: tuple[Any, ...], leaf: Any) -> Any:
        if not replicated(path, leaf) or leaf.nbytes < _WORTH_SHARING:
            return leaf.clone() if isinstance(leaf, Tensor) else leaf
        data = leaf.contiguous().view(-1).view(torch.uint8)
        size = -(-leaf.nbytes // self.sharers)
        part = torch.zeros(size, dtype=torch.uint8, device=leaf.device)
        mine = data[self._place * size : (self._place + 1) * size]
        part[: len(mine)] = mine
        return Share(part, leaf.shape, leaf.dtype)

    def whole(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with every part put together; not after :meth:`part`."""
        shares = {path: leaf for path, leaf in snapshot.leaves.items() if isinstance(leaf, Share)}
        if not shares:
            return snapshot
        if self._parted:
            raise RuntimeError("the last good state is shared among ranks, and this one is no longer among them")
        return replace(
            snapshot, leaves={**snapshot.leaves, **{path: self._put_together(share) for path, share in shares.items()}}
        )

    def _put_together(self, share: Share) -> Tensor:
        part = share.part.cpu()
        parts = [torch.empty_like(part) for _ in range(self.sharers)]
        dist.all_gather(parts, part, group=self._own)
        count = math.prod(share.shape) * share.dtype.itemsize
        return torch.cat(parts)[:count].view(share.dtype).view(share.shape).to(share.part.device)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Mean over ranks, in place."""
        # Over the default group, which knows the tensors' device: the trainer has nothing under way in an intervention.
        with torch.no_grad():
            for tensor in tensors:
                dist.all_reduce(tensor.div_(self.world))

    def part(self) -> None:
        """Nothing waits for the others any more."""
        self._parted = True
        self._hang_up()

    def close(self) -> None:
        """Let go of the group."""
        self._hang_up()
        if dist.is_initialized() and not self._parted:
            for group in {id(group): group for group in (self._own, self._group)}.values():
                dist.destroy_process_group(group)
        self._parted = True

    def _hang_up(self) -> None:
        if self._lines is not None:
            self._lines.close()
