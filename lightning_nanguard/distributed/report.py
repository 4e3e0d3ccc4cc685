"""The report of one rank to the others about one update, and the reading made from the reports of all ranks."""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, final

from lightning_nanguard.thresholds import DistributedThresholds
from lightning_nanguard.types import Reading

# 72 bytes are a multiple of 8, so that a collective can sum them as integers of 64 bits.
_FORMAT = struct.Struct("<3dq5?2q?2q?b")


@final
class Report(NamedTuple):
    """The report of one rank about one update. All fields are numbers, and are sent without loss of bits.

    Attributes:
        loss: Its loss.
        norm: Norm of its gradient, or of its shard of the gradient.
        scale: The GradScaler's scale.
        step: Number of the update.
        has_loss: Whether there was a loss.
        has_gradient: Whether there was a gradient.
        gradient_finite: Whether the gradient is finite.
        has_scale: Whether there is a GradScaler.
        suspects: Whether this rank suspects a fault from the gradient alone.
        snapshot_interval: Number of updates between snapshots that this rank would choose.
        pending_step: Step of the pending snapshot, ``-1`` without one.
        rejects_pending: Whether this rank found a fault in the pending snapshot.
        parameter_checksum: Checksum of the pending snapshot's parameters.
        optimizer_checksum: Checksum of the pending snapshot's optimizer state.
        outside_fault: Whether this rank has found a fault outside an update since its last report, such as in
            validation, or has an invalid hyperparameter.
        snapshot_place: Where this rank would keep snapshots, and how many, as
            :meth:`~lightning_nanguard.state.snapshot_room.Place.code` gives it; ``-1`` if that is open.
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
    snapshot_interval: int
    pending_step: int
    rejects_pending: bool
    parameter_checksum: int
    optimizer_checksum: int
    outside_fault: bool = False
    snapshot_place: int = -1

    def pack(self) -> bytes:
        """The report as 72 bytes."""
        return _FORMAT.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Report:
        """The inverse of :meth:`pack`."""
        return cls(*_FORMAT.unpack(data))


def combined_reading(reports: Sequence[Report], *, optimizer_index: int, sharded: bool) -> Reading:
    """The one reading that all ranks judge: the mean loss, and the norm of the whole gradient.

    Args:
        reports: One report of each rank, in the order of ranks.
        optimizer_index: Index of the optimizer.
        sharded: Whether the norm of each rank is that of a shard; else all ranks hold the same gradient.

    Example:
        >>> healthy = Report(1.0, 3.0, 0.0, 7, True, True, True, False, False, 16, -1, False, 0, 0)
        >>> both = [healthy, healthy._replace(loss=2.0, norm=4.0)]
        >>> reading = combined_reading(both, optimizer_index=0, sharded=True)
        >>> reading.loss, reading.grad_norm
        (1.5, 5.0)
    """
    columns: Any = Report._make(zip(*reports, strict=True))
    losses = columns.loss if all(columns.has_loss) else [one.loss for one in reports if one.has_loss]
    gradient_finite = all(columns.gradient_finite)
    loss_finite = all(map(math.isfinite, losses))
    norm = None
    if any(columns.has_gradient):
        norm = math.hypot(*columns.norm) if sharded else max(columns.norm)
        if not gradient_finite:
            norm = columns.norm[columns.gradient_finite.index(False)]
    return Reading(
        step=reports[0].step,
        optimizer_index=optimizer_index,
        # Divide first: the sum of finite losses may overflow.
        loss=sum([loss / len(losses) for loss in losses]) if losses else None,
        grad_norm=norm,
        finite=gradient_finite and loss_finite,
        loss_finite=loss_finite,
        loss_scale=reports[0].scale if reports[0].has_scale else None,
    )


def outlier_ranks(
    reports: Sequence[Report], thresholds: DistributedThresholds = DistributedThresholds()
) -> tuple[int, ...]:
    """Ranks whose loss or gradient differs clearly from the others; none if all ranks look alike.

    These are the ranks with a loss that is not finite. Without such a loss they are those with a gradient that is not
    finite. If all is finite, it is the rank whose loss is far larger than that of any other.
    """
    by_loss = tuple(rank for rank, one in enumerate(reports) if one.has_loss and not math.isfinite(one.loss))
    if by_loss:
        return by_loss if len(by_loss) < len(reports) else ()
    by_gradient = tuple(rank for rank, one in enumerate(reports) if not one.gradient_finite)
    if by_gradient:
        return by_gradient if len(by_gradient) < len(reports) else ()
    sizes = sorted(((abs(one.loss), rank) for rank, one in enumerate(reports) if one.has_loss), reverse=True)
    if len(sizes) < 2:
        return ()
    (largest, rank), (second, _) = sizes[:2]
    return (rank,) if largest > thresholds.outlier_loss_ratio * max(second, 1e-12) else ()


def minority_ranks(checksums: Sequence[int]) -> tuple[int, ...]:
    """Ranks whose checksum is not the most common one; none if no checksum is more common than all others."""
    (value, count), *others = Counter(checksums).most_common()
    if others and others[0][1] == count:
        return ()
    return tuple(rank for rank, one in enumerate(checksums) if one != value)
