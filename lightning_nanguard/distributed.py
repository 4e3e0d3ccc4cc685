"""Agreement between ranks. It knows ``torch.distributed`` only.

In every update each rank posts a :class:`Report` to all others, without waiting, and goes on; what all posted is heard
in the next update, behind its gradients, without which no rank gets that far. Everything that decides is taken from
those reports, which are the same on all ranks. Only ranks that know from them that all are in an intervention wait for
each other. :class:`Alone` is a single process, at no cost.
"""

from __future__ import annotations

import json
import math
import socket
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_nanguard.checksum import replicated
from lightning_nanguard.events import Finding, Reading
from lightning_nanguard.lines import connect
from lightning_nanguard.snapshot import Share, Snapshot


@final
class Report(NamedTuple):
    """What one rank says about one update: numbers only, which travel bit by bit.

    Attributes:
        loss: Its loss.
        norm: Norm of its gradient, or of its shard of it.
        scale: The GradScaler's scale.
        step: The guard's clock.
        has_loss: Whether there was a loss.
        has_gradient: Whether there was a gradient.
        gradient_finite: Whether the gradient is finite.
        has_scale: Whether there is a GradScaler.
        suspects: Whether the gradient alone looks bad to it.
        interval: Updates between snapshots that it would choose.
        judged: Step of the pending snapshot, ``-1`` without one.
        objects: Whether something speaks against that snapshot.
        parameters: Checksum of that snapshot's parameters.
        moments: Checksum of its optimizer state.
        outside: Whether it has seen a fault outside of any update since it last told, such as in validation.
    """

    loss: float
    norm: float
    scale: float
    step: int
    has_loss: bool
    has_gradient: bool
    gradient_finite: bool
    has_scale: bool
    suspects: bool
    interval: int
    judged: int
    objects: bool
    parameters: int
    moments: int
    outside: bool = False

    def pack(self) -> bytes:
        """All of it in 72 bytes."""
        return _FORMAT.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Report:
        """The inverse of :meth:`pack`."""
        return cls(*_FORMAT.unpack(data))


# Filled up to whole words of eight bytes, which a collective can add.
_FORMAT = struct.Struct("<3dq5?2q?2q?x")


def combined(reports: Sequence[Report], *, stream: int, sharded: bool) -> Reading:
    """The one reading that all ranks judge: mean loss, and the gradient's norm.

    Args:
        reports: One of each rank, in their order.
        stream: Index of the optimizer.
        sharded: Whether each rank's norm is that of a shard; else all hold the same gradient.

    Example:
        >>> healthy = Report(1.0, 3.0, 0.0, 7, True, True, True, False, False, 16, -1, False, 0, 0)
        >>> reading = combined([healthy, healthy._replace(loss=2.0, norm=4.0)], stream=0, sharded=True)
        >>> reading.loss, reading.grad_norm
        (1.5, 5.0)
    """
    told: Any = Report._make(zip(*reports, strict=True))  # a column of each number
    losses = told.loss if all(told.has_loss) else [one.loss for one in reports if one.has_loss]
    gradient_finite = all(told.gradient_finite)
    loss_finite = all(map(math.isfinite, losses))
    norm = None
    if any(told.has_gradient):
        norm = math.hypot(*told.norm) if sharded else max(told.norm)
        if not gradient_finite:
            norm = told.norm[told.gradient_finite.index(False)]
    return Reading(
        step=reports[0].step,
        stream=stream,
        # Divided first: the sum of finite losses may overflow.
        loss=sum([loss / len(losses) for loss in losses]) if losses else None,
        grad_norm=norm,
        finite=gradient_finite and loss_finite,
        loss_finite=loss_finite,
        loss_scale=reports[0].scale if reports[0].has_scale else None,
    )


def conspicuous(reports: Sequence[Report]) -> tuple[int, ...]:
    """Ranks whose own numbers stand out; none where all look alike.

    A loss that is not finite, else a gradient that is not, else a loss more than ten times that of any other rank.
    """
    by_loss = tuple(r for r, one in enumerate(reports) if one.has_loss and not math.isfinite(one.loss))
    if by_loss:
        return by_loss if len(by_loss) < len(reports) else ()
    by_gradient = tuple(r for r, one in enumerate(reports) if not one.gradient_finite)
    if by_gradient:
        return by_gradient if len(by_gradient) < len(reports) else ()
    sizes = sorted(((abs(one.loss), r) for r, one in enumerate(reports) if one.has_loss), reverse=True)
    return (sizes[0][1],) if len(sizes) > 1 and sizes[0][0] > 10 * max(sizes[1][0], 1e-12) else ()


def minority(sums: Sequence[int]) -> tuple[int, ...]:
    """Ranks whose checksum is not the commonest; none where no value is the commonest."""
    (value, count), *others = Counter(sums).most_common()
    if others and others[0][1] == count:
        return ()
    return tuple(rank for rank, one in enumerate(sums) if one != value)


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

    On one machine reports travel over sockets (see :mod:`lightning_nanguard.lines`), else by an asynchronous all-reduce
    over a gloo group of their own. They never mix with the collectives of the trainer or the user, and need no
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


@final
class Silent(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it a collective raises instead of being made: for what one rank runs while others may not."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let everything else through."""
        if func.namespace in ("c10d", "_c10d_functional"):
            raise RuntimeError(f"{func} while a batch is looked at again, which one rank does without the others")
        return func(*args, **(kwargs or {}))
