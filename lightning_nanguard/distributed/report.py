"""What one rank tells the others about one update."""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, final

from lightning_nanguard.types import Reading


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


def combined(reports: Sequence[Report], *, optimizer_index: int, sharded: bool) -> Reading:
    """The one reading that all ranks judge: mean loss, and the gradient's norm.

    Args:
        reports: One of each rank, in their order.
        optimizer_index: Index of the optimizer.
        sharded: Whether each rank's norm is that of a shard; else all hold the same gradient.

    Example:
        >>> healthy = Report(1.0, 3.0, 0.0, 7, True, True, True, False, False, 16, -1, False, 0, 0)
        >>> reading = combined([healthy, healthy._replace(loss=2.0, norm=4.0)], optimizer_index=0, sharded=True)
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
        optimizer_index=optimizer_index,
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
