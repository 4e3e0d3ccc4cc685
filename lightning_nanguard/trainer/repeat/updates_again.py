"""Repeats the updates since a snapshot if the state became bad by itself."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_nanguard.measure.norms import norms
from lightning_nanguard.state.batch_undo import is_undone
from lightning_nanguard.state.device import OutOfMemory
from lightning_nanguard.state.learner import give_scheduled, scheduled_values
from lightning_nanguard.state.restore import restore
from lightning_nanguard.state.snapshot import Snapshot, capture
from lightning_nanguard.trainer.private.averages import RepeatedAverages
from lightning_nanguard.trainer.private.clock import clock_kept, set_clock
from lightning_nanguard.trainer.private.closures import accumulating, end_backward, logging_for, uncounted
from lightning_nanguard.trainer.private.logged_rows import LoggedRow, log_row, row_of_step
from lightning_nanguard.trainer.private.packages import LightningModule, logged_at
from lightning_nanguard.trainer.private.running_means import FIELDS, running_means
from lightning_nanguard.trainer.repeat.accumulation_window import WindowEntry
from lightning_nanguard.trainer.repeat.attempts import Attempts
from lightning_nanguard.trainer.repeat.kept_updates import KeptUpdate, KeptUpdates
from lightning_nanguard.trainer.repeat.repeated_cause import buffer_in_words, update_in_words, written_outside
from lightning_nanguard.types import Reading

_logger = logging.getLogger("lightning_nanguard")


@final
class UpdatesAgain:
    """Repeats the updates since a snapshot.

    Each update is repeated with its own batches, random numbers, attributes and rates. If the first losses are equal
    bit for bit, the updates are reproducible. The first loss that differs then shows when the state became bad.

    Args:
        runs: Runs a micro-batch once.
        kept: The updates that are kept.

    Attributes:
        futile: Whether updates were repeated without success.
    """

    def __init__(self, runs: Attempts, kept: KeptUpdates) -> None:
        self._runs = runs
        self._trainer = runs.trainer
        self._module = runs.module
        self._replay = runs.replay
        context = self._context = runs.guard.context
        self._limits = context.thresholds.batches.repeated
        self._averages = RepeatedAverages(self._trainer)
        self._kept = kept
        self._started = context.state.step
        # Logged values of repeated updates that differ from those of the run.
        self._rows: list[LoggedRow] = []
        # The repeated update whose forward pass wrote NaN into a buffer of the module's own.
        self._writer: KeptUpdate | None = None
        self.futile = False

    def since(self, snapshot: Snapshot, number: int, faulty: int) -> list[KeptUpdate] | None:
        """The updates after a snapshot; ``None`` if they cannot be repeated. See :meth:`KeptUpdates.since`."""
        updates, context = self._kept.since(snapshot, number, faulty), self._context
        if updates is None or context.rate.is_on() or context.clipper.value is not None:
            return None
        return updates if self._averages.can_be_made_again(context.learner.averages()) else None

    def go(
        self, snapshot: Snapshot, number: int, *, then: WindowEntry | None = None, bad: Reading | None = None
    ) -> Callable[[], None] | None:
        """Restore the learner from a snapshot, and repeat the updates up to a given one.

        Args:
            snapshot: The snapshot to begin from.
            number: The last update to repeat.
            then: The next micro-batch. If its loss is bad under the snapshot, too, nothing is repeated. ``None``
                outside of a batch: the module's attributes stay as after the last update.
            bad: The reading of a bad update. If it is equally bad under the snapshot, or its gradient is as large
                again, nothing is repeated.

        Returns:
            A function that restores learner, metrics and means as they were before; ``None`` if the repetition failed
            and nothing has changed.
        """
        # If too few updates agree after the newest snapshot, an older one may decide.
        starts = [snapshot, *(one for one in self._context.ring.certified if one.step < snapshot.step)]
        faulty = number if then is None else number + 1
        ways = [(one, updates) for one in starts if (updates := self.since(one, number, faulty)) is not None]
        if not ways or ways[0][0] is not snapshot:
            return None
        _logger.info("NaNGuard: making the %d updates since the snapshot again.", len(ways[0][1]))
        learner, optimizer = self._context.learner, self._context.learner.optimizers[0]
        try:
            before, after, left = self._capture(snapshot), None, None
            measured = measures = measures_now(self._trainer, self._module)
        except OutOfMemory:
            return None
        self._context.state.redo_cause = "", ""
        scheduled = scheduled_values(optimizer.param_groups)
        try:
            with ExitStack() as inside:
                inside.enter_context(self._replay.rehearsing())
                inside.enter_context(uncounted(self._trainer, None))
                restore(learner, snapshot)
                if (then is None or self._is_finite(then)) and not self._stays_bad(bad, ways[0][1]):
                    made = (start for start, updates in ways if self._make(updates, start, faulty, bad=bad))
                    if (start := next(made, None)) is not None:
                        after = self._capture(snapshot)
                        left = self._runs.memory.attributes_now() if then is None else None
                        measures = measures_now(self._trainer, self._module)
                        # In a step the repetition is needed: the loss may be bad because of such a parameter.
                        untrained = learner.untrained() if then is None else ()
                        if (written := written_outside(start, before, after, untrained)) is not None:
                            _logger.info("NaNGuard: not kept, because code outside of the steps wrote to %s.", written)
                            self._kept.clear()
                        if written is not None or self._is_written_again(snapshot, then):
                            after = None
                    self.futile = after is None and not self._context.state.redo_cause[0]
        except Exception as error:  # an error in a repeated pass must not end the run
            _logger.debug("NaNGuard: the updates since the snapshot could not be made again: %r", error)
        give_scheduled(optimizer.param_groups, scheduled)
        optimizer.zero_grad(set_to_none=True)
        restore(learner, before if after is None else after)
        if after is not None and left is not None:
            left.restore(plain=False)
        if after is None:
            return None
        put_measures(measures, repeated=True)
        return partial(self._put_back, before, measured)

    def log_again(self) -> None:
        """The repeated updates are kept: log the values again that differ from those that loggers have."""
        rows, self._rows, now = self._rows, [], logged_at(self._trainer)
        for row in rows:
            if row.step < now:  # the present update is logged later
                log_row(self._trainer, row)

    def _put_back(self, before: Snapshot, measures: _Measures) -> None:
        restore(self._context.learner, before)
        put_measures(measures)

    def _capture(self, beside: Snapshot) -> Snapshot:
        step, clock = self._context.state.step, self._trainer.global_step
        return capture(self._context.learner, step=step, global_step=clock, device=beside.device())

    def _is_finite(self, micro: WindowEntry) -> bool:
        micro.start.restore()
        loss = micro.run.forward().closure_loss
        return loss is None or bool(torch.isfinite(loss).all())

    def _stays_bad(self, bad: Reading | None, updates: list[KeptUpdate]) -> bool:
        """Whether a non-finite update is not finite again. Then the other updates need not be repeated."""
        update = next((one for one in updates if bad is not None and not bad.finite and one.number == bad.step), None)
        if bad is None or update is None:
            return False
        losses = [loss for _, loss in self._losses(update, spoilt=False)]
        return not all(bool(torch.isfinite(loss).all()) for loss in losses) or self._is_as_large(bad)

    def _make(self, updates: list[KeptUpdate], snapshot: Snapshot, faulty: int, *, bad: Reading | None) -> bool:
        restore(self._context.learner, snapshot)
        if snapshot.step > self._started:  # the snapshot is older than the averages of its update
            self._average_again(snapshot.step, snapshot.global_step - 1)
        same, differs, self._rows, self._writer = 0, False, [], None
        for update in updates:
            self._measure_from(update, first=update is updates[0])
            if self._kept.was_skipped(update, faulty):
                continue
            for known, now in self._losses(update, spoilt=differs or (bad is not None and update.number > bad.step)):
                if not bool(torch.isfinite(now).all()):
                    self._is_written_again(snapshot, None)
                    return False
                differs = differs or not _is_same(known, now)
                same += not differs
            if self._writer is None and self._spoilt_buffer(snapshot) is not None:
                self._writer = update
            if differs and same < self._limits.same_losses:
                return False  # the updates are not reproducible
            if differs and (row := row_of_step(self._trainer, update.logged_at, update.epoch)) is not None:
                self._rows.append(row)
            if bad is not None and update.number >= bad.step and self._is_as_large(bad):
                return False  # its batch is bad
            if not self._stays_finite(update, snapshot):
                return False
            self._average_again(update.number, update.global_step)
        return self._context.corrupt()[0] is None

    def _is_written_again(self, snapshot: Snapshot, then: WindowEntry | None) -> bool:
        """Whether the repeated updates wrote NaN into a buffer on which the next loss depends; if so, note the cause.

        Args:
            snapshot: The state before the updates.
            then: The next micro-batch; ``None`` if its loss is known to be bad.
        """
        written = self._spoilt_buffer(snapshot)
        if written is None or (then is not None and self._is_finite(then)):
            return False
        self._note_written(written, self._writer, snapshot)
        return True

    def _spoilt_buffer(self, snapshot: Snapshot) -> str | None:
        return self._context.finite.spoilt_buffer(self._context.learner.leaves(), snapshot.leaves)

    def _note_written(self, spoilt: str, update: KeptUpdate | None, snapshot: Snapshot, *, batch: str = "") -> None:
        """Note that the forward pass of an update wrote a buffer. Its line is sought from the state of the snapshot."""

        def run() -> None:
            if update is None:
                return
            try:
                restore(self._context.learner, snapshot)
                self._losses(update, spoilt=True)
            except Exception as error:  # the line is then left out
                _logger.debug("NaNGuard: the line that writes %s was not found: %r", spoilt, error)

        self._context.state.redo_cause = "forward_writes_buffer", buffer_in_words(self._module, spoilt, run) + batch

    def _measure_from(self, update: KeptUpdate, *, first: bool) -> None:
        """Restore the metrics and means before the first update. Later ones follow from the repeated updates."""
        if not (first or update.opens_epoch):
            return
        repeated = measures_now(self._trainer, self._module)
        for undo in update.measures:
            undo()
        if not first:
            put_measures(repeated, repeated=True)  # metrics that were not reset at the end of the epoch

    def _average_again(self, number: int, global_step: int) -> None:
        self._averages.make_again(global_step)
        for epoch in self._kept.ended_with(number):
            self._averages.end_epoch_again(epoch)

    def _stays_finite(self, update: KeptUpdate, snapshot: Snapshot) -> bool:
        """Make an update with finite losses; return whether the state stays finite. If not, note the cause."""
        state, module = self._context.state, self._module
        written = self._context.corrupt()[0]
        if written is not None:
            self._note_written(written, update, snapshot, batch=self._strange_batch(update))
            return False
        sizes = self._step(update)
        spoilt = self._context.corrupt()[0]
        if spoilt is not None and max(sizes, default=0.0) < self._limits.squared:
            state.redo_cause = "optimizer_update", update_in_words(module, update.micros[0].run.optimizer, spoilt)
        return spoilt is None

    def _strange_batch(self, update: KeptUpdate) -> str:
        """Names the batch of an update if its values are far larger than in the batches before; else ``""``."""
        for micro in update.micros:
            if self._replay.batches.strange(micro.run.batch, extreme=True):
                where = f"batch {micro.run.batch_idx} of epoch {update.epoch}"
                return f" after {where} (its values are far larger than in the batches before)"
        return ""

    def _losses(self, update: KeptUpdate, *, spoilt: bool) -> list[tuple[Tensor | None, Tensor]]:
        optimizer = update.micros[0].run.optimizer
        give_scheduled(optimizer.param_groups, update.groups)
        losses: list[tuple[Tensor | None, Tensor]] = []
        for micro in update.micros:
            micro.start.restore(carried=not spoilt)  # values carried from bad weights are not used
            with self._clock_of(update), logging_for(self._trainer, micro.run.batch):
                result = micro.run.whole()
            if result.loss is not None:
                losses.append((micro.loss, result.loss))
                spoilt = spoilt or not _is_same(*losses[-1])
        return losses

    def _is_as_large(self, bad: Reading) -> bool:
        norm = math.hypot(*norms(self._context.learner.gradients(0)))
        usual = math.inf if bad.grad_norm is None or not bad.finite else bad.grad_norm * self._limits.gone_below
        return not norm < usual

    def _step(self, update: KeptUpdate) -> list[float]:
        """Let the optimizer step; return the norms of the gradients."""
        optimizer = update.micros[0].run.optimizer
        with self._clock_of(update):
            end_backward(self._trainer, optimizer)
            sizes = norms(self._context.learner.gradients(0))
            optimizer.step()
        return sizes

    @contextmanager
    def _clock_of(self, update: KeptUpdate) -> Iterator[None]:
        """Inside, trainer and module have the clock and the window of accumulation that they had in an update."""
        with clock_kept(self._trainer), accumulating(self._trainer, update.window):
            set_clock(self._trainer, update.global_step, update.epoch)
            yield


def _is_same(known: Tensor | None, now: Tensor) -> bool:
    return known is not None and torch.equal(known, now)


_Measures = list[tuple[Metric, dict[str, Any]]]


def measures_now(trainer: Any, module: LightningModule) -> _Measures:
    """The present state of all metrics and running means."""
    counted = [one for one in module.modules() if isinstance(one, Metric) and is_undone(one)]
    return [(one, _held(one)) for one in (*counted, *running_means(trainer))]


def put_measures(measures: _Measures, *, repeated: bool = False) -> None:
    """Restore metrics and running means.

    Args:
        measures: The result of :func:`measures_now`.
        repeated: Whether it is from repeated updates. Then a value is used only if it has as many updates as in the
            run. Otherwise code that is not repeated, such as a validation, has reset or updated it.
    """
    for metric, held in measures:
        if not repeated or held["_update_count"] == metric._update_count:
            for name, value in held.items():
                setattr(metric, name, _copied(value))


def _held(metric: Metric) -> dict[str, Any]:
    names = {*metric._defaults, *FIELDS, "_computed"} & vars(metric).keys()
    return {name: _copied(getattr(metric, name)) for name in names}


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value
