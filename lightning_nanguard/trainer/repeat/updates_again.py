"""Repeats the updates since a snapshot if the state became bad by itself."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor

from lightning_nanguard.measure.batches import bytes_of
from lightning_nanguard.measure.norms import norms
from lightning_nanguard.state.device import OutOfMemory
from lightning_nanguard.state.learner import give_scheduled, scheduled_values
from lightning_nanguard.state.random_state import is_checked
from lightning_nanguard.state.restore import restore
from lightning_nanguard.state.snapshot import Snapshot, capture
from lightning_nanguard.state.step_start import StepStart
from lightning_nanguard.trainer.private.averages import RepeatedAverages
from lightning_nanguard.trainer.private.clock import clock_kept, set_clock
from lightning_nanguard.trainer.private.closures import accumulated, accumulating, end_backward, logging_for, uncounted
from lightning_nanguard.trainer.private.logged_rows import LoggedRow, log_row, row_of_step
from lightning_nanguard.trainer.private.packages import logged_at
from lightning_nanguard.trainer.repeat.attempts import Attempts
from lightning_nanguard.trainer.repeat.measures import RepeatedMeasures
from lightning_nanguard.trainer.repeat.repeated_cause import buffer_in_words, update_in_words, written_outside
from lightning_nanguard.trainer.repeat.window import WindowEntry
from lightning_nanguard.types import Reading

_logger = logging.getLogger("lightning_nanguard")


@final
@dataclass(slots=True, eq=False)
class _Update:
    """The data of an earlier update, to repeat it.

    Attributes:
        number: Its number.
        micros: Its micro-batches; empty if it was skipped or cannot be repeated.
        groups: The values in the optimizer's groups that schedulers set.
        global_step: The trainer's clock before it.
        measures: Functions that restore the metrics and means before it; empty if an earlier update has them.
        opens_epoch: Whether it is the first of its epoch.
        logged_at: The step that loggers get after it.
        epoch: Its epoch.
        window: The number of micro-batches by which its losses were divided.
    """

    number: int
    micros: list[WindowEntry]
    groups: list[dict[str, Any]]
    global_step: int
    measures: Sequence[Callable[[], None]]
    opens_epoch: bool
    logged_at: int
    epoch: int
    window: int


@final
class UpdatesAgain:
    """Keeps references to the batches since the last certified snapshot, and repeats their updates.

    Each update is repeated with its own batches, random numbers, attributes and rates. If the first losses are equal
    bit for bit, the updates are reproducible. The first loss that differs then shows when the state became bad.

    Args:
        runs: Runs a micro-batch once.

    Attributes:
        futile: Whether updates were repeated without success.
    """

    def __init__(self, runs: Attempts) -> None:
        self._runs = runs
        self._trainer = runs.trainer
        self._module = runs.module
        self._replay = runs.replay
        context = self._context = runs.guard.context
        limits = self._limits = context.thresholds.batches.repeated
        self._averages = RepeatedAverages(self._trainer)
        self._measures = RepeatedMeasures(self._trainer, self._module)
        self._kept: deque[_Update] = deque()
        self._counted = 0
        self._room = 0
        # The start of the last update, if the size of the next one is measured.
        self._before: StepStart | None = None
        self._started = context.state.step
        # The epoch of the newest update; the last update of each epoch before.
        self._epoch = -1
        self._ends: deque[tuple[int, int]] = deque(maxlen=limits.updates_again or 1)
        # The snapshot that the last rollback restored, and the first update after it.
        self._rolled_back = -1, -1
        # Logged values of repeated updates that differ from those of the run.
        self._rows: list[LoggedRow] = []
        # The repeated update whose forward pass wrote NaN into a buffer of the module's own.
        self._writer: _Update | None = None
        self.futile = False
        learner = context.learner
        alone = context.acts_alone
        plain = len(learner.optimizers) == 1 and not learner.quasi_newton and learner.scaler is None
        self._possible = alone and plain and limits.updates_again > 0

    def keep(self) -> None:
        """Keep the data of the update that is about to be made."""
        if not self._possible:
            return
        number, micros = self._runs.check.number, self._runs.window.whole()
        kept, limits, ring = self._kept, self._limits, self._context.ring
        state = self._context.state
        if state.healthy_since_restore == 0 and not state.redone:
            kept.clear()  # these updates were undone by a rollback
            self._rolled_back = ring.certified[0].step if ring.certified else -1, number
        if micros and is_checked(self._counted, limits.measured_every):
            held = self._bytes_of(micros)
            self._room = 0 if held is None else min(limits.updates_again, limits.bytes_again // max(1, held))
        self._counted += 1
        weighs_next = micros and is_checked(self._counted, limits.measured_every)
        self._before = micros[-1].start if weighs_next else None
        opens_epoch = self._trainer.current_epoch != self._epoch
        if opens_epoch:
            if self._epoch >= 0:
                self._ends.append((number - 1, self._epoch))
            self._epoch = self._trainer.current_epoch
        while kept and ring.certified and kept[0].number <= ring.certified[-1].step:
            kept.popleft()
        if kept and kept[-1].number != number - 1:
            kept.clear()  # updates before a gap cannot be used
        while len(kept) >= max(1, self._room):
            kept.popleft()
        # After a gap, the kept updates begin at the pending snapshot, which may be certified before they are needed.
        newest = ring.pending or next(iter(ring.certified), None)
        first = number if newest is None else self._first_after(newest)
        if kept and kept[0].number > first:
            kept.clear()  # snapshots are too far apart for this
        if self._room and (kept or number <= first):
            scheduled = scheduled_values(self._context.learner.optimizers[0].param_groups)
            before: Sequence[Callable[[], None]] = ()
            if opens_epoch or not kept or (newest is not None and newest.step == number - 1):
                self._forget_measures()
                before = self._runs.guard.steps.undos.measures()
            clock, step, window = self._trainer.global_step, logged_at(self._trainer), accumulated(self._trainer)
            kept.append(_Update(number, list(micros), scheduled, clock, before, opens_epoch, step, self._epoch, window))

    def _forget_measures(self) -> None:
        """Release the metrics and means that no remaining snapshot and no epoch needs."""
        ring = self._context.ring
        after = {one.step for one in (*ring.certified, ring.pending) if one is not None}
        for update in self._kept:
            if not update.opens_epoch and update.number - 1 not in after:
                update.measures = ()

    def _first_after(self, snapshot: Snapshot) -> int:
        """Number of the first update that was made from a snapshot."""
        step, number = self._rolled_back
        return number if snapshot.step == step else snapshot.step + 1

    def _bytes_of(self, micros: list[WindowEntry]) -> int | None:
        """Bytes that are kept only for one update; ``None`` if they are not known."""
        starts = [*([] if self._before is None else [self._before]), *(micro.start for micro in micros)]
        values = [value for one, other in pairwise(starts) for value in other.attributes.not_in(one.attributes)]
        return bytes_of([*values, *(micro.run.batch for micro in micros)], _holds_more)

    def since(self, snapshot: Snapshot, number: int, faulty: int) -> list[_Update] | None:
        """The updates after a snapshot; ``None`` if one is not kept or cannot be repeated.

        Args:
            snapshot: The snapshot.
            number: The last of the updates.
            faulty: The update of the present fault. All updates before it that were skipped stay skipped.
        """
        context = self._context
        if not self._possible or context.rate.is_on() or context.clipper.value is not None:
            return None
        if not self._averages.can_be_made_again(context.learner.averages()):
            return None
        updates = [one for one in self._kept if snapshot.step < one.number <= number]
        numbers, first = [one.number for one in updates], self._first_after(snapshot)
        tensors = any(isinstance(value, Tensor) for one in updates for group in one.groups for value in group.values())
        if not all(one.micros or self._was_skipped(one, faulty) for one in updates):
            return None
        return None if tensors or numbers != list(range(first, number + 1)) else updates

    def _was_skipped(self, update: _Update, faulty: int) -> bool:
        """Whether the run skipped an update. The one with the present fault does not count as skipped."""
        return update.number < faulty and update.number in self._context.state.skipped

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
            measured = measures = self._measures.now()
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
                        measures = self._measures.now()
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
        self._measures.take(measures)
        return partial(self._put_back, before, measured)

    def log_again(self) -> None:
        """The repeated updates are kept: log the values again that differ from those that loggers have."""
        rows, self._rows, now = self._rows, [], logged_at(self._trainer)
        for row in rows:
            if row.step < now:  # the present update is logged later
                log_row(self._trainer, row)

    def _put_back(self, before: Snapshot, measures: Sequence[tuple[Any, dict[str, Any]]]) -> None:
        restore(self._context.learner, before)
        self._measures.put(measures)

    def _capture(self, beside: Snapshot) -> Snapshot:
        step, clock = self._context.state.step, self._trainer.global_step
        return capture(self._context.learner, step=step, global_step=clock, device=beside.device())

    def _is_finite(self, micro: WindowEntry) -> bool:
        micro.start.restore()
        loss = micro.run.forward().closure_loss
        return loss is None or bool(torch.isfinite(loss).all())

    def _stays_bad(self, bad: Reading | None, updates: list[_Update]) -> bool:
        """Whether a non-finite update is not finite again. Then the other updates need not be repeated."""
        update = next((one for one in updates if bad is not None and not bad.finite and one.number == bad.step), None)
        if bad is None or update is None:
            return False
        losses = [loss for _, loss in self._losses(update, spoilt=False)]
        return not all(bool(torch.isfinite(loss).all()) for loss in losses) or self._is_as_large(bad)

    def _make(self, updates: list[_Update], snapshot: Snapshot, faulty: int, *, bad: Reading | None) -> bool:
        restore(self._context.learner, snapshot)
        if snapshot.step > self._started:  # the snapshot is older than the averages of its update
            self._average_again(snapshot.step, snapshot.global_step - 1)
        same, differs, self._rows, self._writer = 0, False, [], None
        for update in updates:
            self._measure_from(update, first=update is updates[0])
            if self._was_skipped(update, faulty):
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

    def _note_written(self, spoilt: str, update: _Update | None, snapshot: Snapshot, *, batch: str = "") -> None:
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

    def _measure_from(self, update: _Update, *, first: bool) -> None:
        """Restore the metrics and means before the first update. Later ones follow from the repeated updates."""
        if not (first or update.opens_epoch):
            return
        repeated = self._measures.now()
        for undo in update.measures:
            undo()
        if not first:
            self._measures.take(repeated)  # metrics that were not reset at the end of the epoch

    def _average_again(self, number: int, global_step: int) -> None:
        self._averages.make_again(global_step)
        for last, epoch in (*self._ends, (self._context.state.step, self._epoch)):
            if last == number:
                self._averages.end_epoch_again(epoch)

    def _stays_finite(self, update: _Update, snapshot: Snapshot) -> bool:
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

    def _strange_batch(self, update: _Update) -> str:
        """Names the batch of an update if its values are far larger than in the batches before; else ``""``."""
        for micro in update.micros:
            if self._replay.batches.strange(micro.run.batch, extreme=True):
                where = f"batch {micro.run.batch_idx} of epoch {update.epoch}"
                return f" after {where} (its values are far larger than in the batches before)"
        return ""

    def _losses(self, update: _Update, *, spoilt: bool) -> list[tuple[Tensor | None, Tensor]]:
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

    def _step(self, update: _Update) -> list[float]:
        """Let the optimizer step; return the norms of the gradients."""
        optimizer = update.micros[0].run.optimizer
        with self._clock_of(update):
            end_backward(self._trainer, optimizer)
            sizes = norms(self._context.learner.gradients(0))
            optimizer.step()
        return sizes

    @contextmanager
    def _clock_of(self, update: _Update) -> Iterator[None]:
        """Inside, trainer and module have the clock and the window of accumulation that they had in an update."""
        with clock_kept(self._trainer), accumulating(self._trainer, update.window):
            set_clock(self._trainer, update.global_step, update.epoch)
            yield


def _is_same(known: Tensor | None, now: Tensor) -> bool:
    return known is not None and torch.equal(known, now)


def _holds_more(tensor: Tensor) -> bool:
    """Whether a tensor keeps more than its numbers in memory: a graph, or a file of shared memory."""
    try:
        return tensor.grad_fn is not None or (tensor.is_cpu and tensor.is_shared())  # type: ignore[no-untyped-call]
    except NotImplementedError:  # not supported for sparse tensors
        return True
