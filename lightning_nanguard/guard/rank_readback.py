"""Readings of several ranks: every rank reports each update to the others, and all judge the same reading.

A rank must not decide by its own data alone whether and when it waits. So every rank reports every update, and reads
the reports of all ranks at the same point of a later update. A rank to which an update looks bad may read the reports
earlier, because all ranks have posted theirs or are about to. If the update looks bad to all ranks, all of them have
read the reports, and they act together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, TypeAlias, final

from lightning_nanguard.act.skip import StepSkipper
from lightning_nanguard.distributed.ranks import PendingReports
from lightning_nanguard.distributed.report import Report, combined_reading, outlier_ranks
from lightning_nanguard.guard.caution import Caution
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.local_readback import DeferredReadings, LocalReadback
from lightning_nanguard.guard.meter import Meter
from lightning_nanguard.guard.readback import Arrived
from lightning_nanguard.guard.snapshot_manager import SnapshotManager
from lightning_nanguard.measure.readings import PendingReading
from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.types import Fault, Reading


@final
class Sent(NamedTuple):
    """One update that was reported to the other ranks.

    Attributes:
        posted: The reports of all ranks about the update.
        reading: The reading of this rank.
        undo: Undoes what its batch changed.
        held_back: Whether the device itself skips a bad update.
        line_search: Whether it was a further closure of one step, as in the line search of LBFGS.
    """

    posted: PendingReports
    reading: Reading
    undo: BatchUndo
    held_back: bool
    line_search: bool

    def suspected_by_all(self) -> bool:
        """Whether the update looks bad to every rank."""
        return all(one.suspects for one in self.posted())


@final
@dataclass(eq=False)
class RankReadback:
    """Readings that all ranks have reported. Its methods are called like those of :class:`LocalReadback`.

    Args:
        context: Objects and settings that the parts of the guard share.
        meter: Measures loss and gradient norm.
        readings: Readings of this rank that have not arrived yet.
        caution: Decides which updates are read before they are made.
        skipper: Skips an update that looks bad on this rank.
        snapshots: Exchanges reports about snapshots.

    Attributes:
        at_hand: Always ``None``: no rank decides by its own reading alone.
    """

    context: GuardContext
    meter: Meter
    readings: DeferredReadings
    caution: Caution
    skipper: StepSkipper
    snapshots: SnapshotManager
    _sent: deque[Sent] = field(default_factory=deque, init=False)
    _late: bool = field(default=False, init=False)
    # A fault that this rank found outside a step. The others are told of it with the next update.
    _outside: Fault | None = field(default=None, init=False)
    # The early report of the next update, if the update looked bad.
    _told: Sent | None = field(default=None, init=False)
    at_hand: Reading | None = field(default=None, init=False)

    def due(self, optimizer_index: int) -> Iterator[Arrived]:
        """The reports of all ranks about earlier updates."""
        self._late = self.caution.may_be_late(optimizer_index)
        return self._heard()

    def tell_early(self, reading: Reading, undo: BatchUndo) -> tuple[Reading, tuple[int, ...]] | None:
        """Report an update that looks bad to this rank, right after its backward pass.

        Args:
            reading: The reading of this rank.
            undo: Undoes what its batch changed.

        Returns:
            The reading of all ranks and the ranks that stand out, if the update looks bad to all ranks; else ``None``.
            In the first case all ranks have reported it by now.
        """
        sent = self._told = self._tell(reading, undo, suspects=True)
        if not sent.suspected_by_all():
            return None
        reports, context = sent.posted(), self.context
        combined = combined_reading(reports, optimizer_index=reading.optimizer_index, sharded=context.ranks.sharded)
        return combined, outlier_ranks(reports, context.thresholds.distributed)

    def forget_told(self) -> None:
        """Forget the early report, because the update is made again."""
        self._told = None

    def submit(self, optimizer_index: int, undo: BatchUndo) -> Arrived | None:
        """Report this update; return its reading only if it looks bad to all ranks."""
        step = self.context.state.step
        told, self._told = self._told, None
        if told is not None and (told.reading.step, told.reading.optimizer_index) == (step, optimizer_index):
            return self._wait_or_skip(told)
        measured = (self.meter.measure_later if self._late else self.meter.measure_now)(step, optimizer_index)
        line_search = self.meter.is_line_search(optimizer_index)
        if isinstance(measured, PendingReading):
            self.readings.defer(measured, undo, line_search=line_search)
            self._tell_queued(1)
            return None
        self._tell_queued(0)
        reading = Reading(step, optimizer_index, None, None) if measured is None else measured
        suspects = self._suspects(reading)
        sent = self._tell(reading, undo, suspects=suspects, line_search=line_search)
        if suspects:
            return self._wait_or_skip(sent)
        self._sent.append(sent)
        return None

    def _wait_or_skip(self, sent: Sent) -> Arrived | None:
        """Handle an update that looks bad here: return its reading if all ranks see it so, else skip it here."""
        if sent.suspected_by_all():
            return self._hear(sent, late=False)
        if not sent.reading.gradient_finite and not self.context.settings.observe:
            # Other ranks do not: they learn of it later, and all roll back.
            self.skipper.skip(sent.reading.optimizer_index)
        self._sent.append(sent)
        return None

    def arrived(self) -> Iterator[Arrived]:
        """Return nothing: the reports are read with the next update."""
        return iter(())

    def _heard(self) -> Iterator[Arrived]:
        while self._sent:
            yield self._hear(self._sent.popleft(), late=True)

    def _hear(self, sent: Sent, *, late: bool) -> Arrived:
        reports = sent.posted()
        outside = any(one.outside_fault for one in reports)
        self.context.state.asks_hyperparameters |= outside
        self.snapshots.hear(reports)
        index, sharded = sent.reading.optimizer_index, self.context.ranks.sharded
        reading = combined_reading(reports, optimizer_index=index, sharded=sharded)
        held_back = sent.held_back and not any(one.gradient_finite for one in reports)
        return Arrived(
            reading,
            sent.undo,
            reached=late and not held_back,
            late=late,
            line_search=sent.line_search,
            ranks=lambda: outlier_ranks(reports, self.context.thresholds.distributed),
            outside=self._ask_outside() if outside else None,
        )

    def _ask_outside(self) -> tuple[Fault, tuple[int, ...]] | None:
        # All ranks call this at the same time.
        mine, self._outside = self._outside, None
        told: list[dict[str, Any] | None] = self.context.ranks.gather(None if mine is None else asdict(mine))
        ranks = tuple(rank for rank, one in enumerate(told) if one is not None)
        first = told[ranks[0]] if ranks else None
        return None if first is None else (Fault(**first), ranks if len(ranks) < len(told) else ())

    def _suspects(self, reading: Reading) -> bool:
        # Only the gradient counts, because it is the same on all ranks. Losses are not.
        if self.context.learner.scaler is not None and not reading.gradient_finite:
            return True  # the losses of all ranks show whether it is an overflow or comes from a loss
        gradient = reading._replace(loss=None, loss_finite=True, finite=reading.gradient_finite)
        return self.context.monitors.check(gradient) is not None

    def _tell_queued(self, left: int) -> None:
        while len(self.readings) > left:
            pending, undo, line_search = self.readings.next()
            held_back = pending.held_back
            self._sent.append(self._tell(pending.read(), undo, held_back=held_back, line_search=line_search))

    def _tell(
        self,
        reading: Reading,
        undo: BatchUndo,
        *,
        suspects: bool = False,
        held_back: bool = False,
        line_search: bool = False,
    ) -> Sent:
        interval, judged, objects, parameters, moments = self.snapshots.tell()
        report = Report(
            loss=reading.loss or 0.0,
            norm=reading.grad_norm or 0.0,
            scale=reading.loss_scale or 0.0,
            step=reading.step,
            has_loss=reading.loss is not None,
            has_gradient=reading.grad_norm is not None,
            gradient_finite=reading.gradient_finite,
            has_scale=reading.loss_scale is not None,
            suspects=suspects,
            snapshot_interval=interval,
            pending_step=judged,
            rejects_pending=objects,
            parameter_checksum=parameters,
            optimizer_checksum=moments,
            outside_fault=self._outside is not None or self.context.rate.valid.any(),
            snapshot_place=self.snapshots.placement.wanted(),
        )
        posted = self.context.ranks.post(report)
        return Sent(posted, reading, undo, held_back, line_search)

    def flush(self) -> Iterator[Arrived]:
        """Read what all ranks have reported, and what this rank has still to report."""
        self._tell_queued(0)
        return self._heard()

    def hold(self, fault: Fault) -> bool:
        """Keep the fault: the other ranks are told of it with the next update."""
        self._outside = fault
        return True

    def end_batch(self) -> bool:
        """Remove the flags from the optimizers; readings may still arrive."""
        self.readings.drop_flags()
        return True

    def clear(self) -> None:
        """Forget all reports, all readings that have not arrived yet, and a fault that was found outside of a step."""
        self._outside = None
        self._sent.clear()
        self.readings.clear()


Readback: TypeAlias = LocalReadback | RankReadback
"""One way in which readings arrive."""
