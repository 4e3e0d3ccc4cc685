"""What ranks tell each other of every update, and what they hear.

Whether and when a rank waits must not hang on what it alone knows: every rank tells of every update and hears of it at
the same point of a later one. A rank may hear early of an update that looks bad to it, since all have told or are about
to; only if it looks bad to all, all of them have heard, and act together.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, final

from lightning_nanguard.detect.monitors import Monitors
from lightning_nanguard.distributed.ranks import PendingReports, Ranks
from lightning_nanguard.distributed.report import Report, combined_reading, outlier_ranks
from lightning_nanguard.guard.snapshot_manager import SnapshotManager
from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.types import Fault, Reading


@final
class Sent(NamedTuple):
    """One update that the other ranks were told about.

    Attributes:
        posted: What all ranks say about it.
        optimizer_index: Index of the optimizer.
        scope: What its batch may have touched.
        held_back: Whether the device itself keeps a bad update from the weights.
        trial: Whether it was a further closure of one step.
    """

    posted: PendingReports
    optimizer_index: int
    scope: BatchUndo
    held_back: bool
    trial: bool

    def suspected_by_all(self) -> bool:
        """Whether it looks bad to every rank."""
        return all(one.suspects for one in self.posted.reports())


@final
class Heard(NamedTuple):
    """What all ranks say of one update.

    Attributes:
        reading: Theirs, in one.
        reports: Theirs, one by one.
        held_back: Whether the update was kept from the weights on all of them.
        outside: Whether one of them found a fault outside a step.
    """

    reading: Reading
    reports: Sequence[Report]
    held_back: bool
    outside: bool

    def ranks(self) -> tuple[int, ...]:
        """Those that stand out, where not all do."""
        return outlier_ranks(self.reports)


@final
class RankReadings:
    """Reports on updates, told and not yet heard, oldest first.

    Args:
        ranks: All processes.
        learner: What is trained.
        keeper: Tells and hears of snapshots.
        monitors: Detectors, which say what looks bad.
    """

    def __init__(self, ranks: Ranks, learner: Learner, keeper: SnapshotManager, monitors: Monitors) -> None:
        self._ranks = ranks
        self._learner = learner
        self._keeper = keeper
        self._monitors = monitors
        self._sent: deque[Sent] = deque()
        # A fault that this rank found outside a step, of which the others are to hear with the next update.
        self.outside: Fault | None = None

    def suspects(self, reading: Reading) -> bool:
        """Whether the update looks bad to this rank."""
        # By the gradient alone, which is the same on all ranks: losses are not.
        if self._learner.scaler is not None and not gradient_finite(reading):
            return True  # whether it is an overflow, or comes from a loss, shows in the losses of all
        gradient = reading._replace(loss=None, loss_finite=True, finite=gradient_finite(reading))
        return self._monitors.check(gradient) is not None

    def tell(
        self, reading: Reading, scope: BatchUndo, *, suspects: bool = False, held_back: bool = False, trial: bool
    ) -> Sent:
        """Tell the other ranks of an update; see :class:`Sent`."""
        posted = self._ranks.post(self._report_on(reading, suspects=suspects))
        return Sent(posted, reading.optimizer_index, scope, held_back, trial)

    def _report_on(self, reading: Reading, *, suspects: bool) -> Report:
        interval, judged, objects, parameters, moments = self._keeper.tell()
        return Report(
            loss=reading.loss or 0.0,
            norm=reading.grad_norm or 0.0,
            scale=reading.loss_scale or 0.0,
            step=reading.step,
            has_loss=reading.loss is not None,
            has_gradient=reading.grad_norm is not None,
            gradient_finite=gradient_finite(reading),
            has_scale=reading.loss_scale is not None,
            suspects=suspects,
            snapshot_interval=interval,
            pending_step=judged,
            rejects_pending=objects,
            parameter_checksum=parameters,
            optimizer_checksum=moments,
            outside_fault=self.outside is not None,
        )

    def keep(self, sent: Sent) -> None:
        """Hear of it later."""
        self._sent.append(sent)

    def next(self) -> Sent | None:
        """The oldest one not yet heard of."""
        return self._sent.popleft() if self._sent else None

    def hear(self, sent: Sent) -> Heard:
        """What all ranks say of an update; where they must, wait for it."""
        reports = sent.posted.reports()
        self._keeper.hear(reports)
        return Heard(
            combined_reading(reports, optimizer_index=sent.optimizer_index, sharded=self._ranks.sharded),
            reports,
            held_back=sent.held_back and not any(one.gradient_finite for one in reports),
            outside=any(one.outside_fault for one in reports),
        )

    def ask_outside(self) -> tuple[Fault, tuple[int, ...]] | None:
        """The fault found outside a step, and by which ranks where not by all; all must call it."""
        mine, self.outside = self.outside, None
        told = self._ranks.gather(None if mine is None else [mine.kind, mine.scope, mine.place, mine.message])
        ranks = tuple(rank for rank, one in enumerate(told) if one is not None)
        if not ranks:
            return None
        kind, scope, place, message = told[ranks[0]]
        return Fault(kind, scope, place, None, message), ranks if len(ranks) < len(told) else ()

    def clear(self) -> None:
        """Forget what was told."""
        self._sent.clear()


def gradient_finite(reading: Reading) -> bool:
    """Whether the gradient of an update is finite, as far as it has one."""
    return reading.grad_norm is None or math.isfinite(reading.grad_norm)
