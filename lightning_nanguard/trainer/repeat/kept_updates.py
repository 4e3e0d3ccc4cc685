"""Keeps the data of the updates since the last certified snapshots, so that they can be repeated."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, final

from torch import Tensor

from lightning_nanguard.measure.batches import bytes_of
from lightning_nanguard.state.learner import scheduled_values
from lightning_nanguard.state.random_state import is_checked
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.state.step_start import StepStart
from lightning_nanguard.trainer.private.packages import logged_at
from lightning_nanguard.trainer.repeat.accumulation_window import WindowEntry
from lightning_nanguard.trainer.repeat.attempts import Attempts


@final
@dataclass(slots=True, eq=False)
class KeptUpdate:
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
class KeptUpdates:
    """Keeps references to the batches of the updates since the oldest certified snapshot, as far as there is room.

    Args:
        runs: Has the guard, the trainer, and the micro-batches of the present update.
    """

    def __init__(self, runs: Attempts) -> None:
        self._runs = runs
        self._trainer = runs.trainer
        context = self._context = runs.guard.context
        limits = self._limits = context.thresholds.batches.repeated
        self._kept: deque[KeptUpdate] = deque()
        self._counted = 0
        self._room = 0
        # The start of the last update, if the size of the next one is measured.
        self._before: StepStart | None = None
        # The epoch of the newest update; the last update of each epoch before.
        self._epoch = -1
        self._ends: deque[tuple[int, int]] = deque(maxlen=limits.updates_again or 1)
        # The snapshot that the last rollback restored, and the first update after it.
        self._rolled_back = -1, -1
        self._possible = context.acts_alone and context.learner.is_plain and limits.updates_again > 0

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
        newest = ring.latest
        first = number if newest is None else self._first_after(newest)
        if kept and kept[0].number > first:
            kept.clear()  # snapshots are too far apart for this
        if self._room and (kept or number <= first):
            before: Sequence[Callable[[], None]] = ()
            if opens_epoch or not kept or (newest is not None and newest.step == number - 1):
                self._forget_measures()
                before = self._runs.guard.steps.undos.measures()
            kept.append(
                KeptUpdate(
                    number,
                    list(micros),
                    groups=scheduled_values(self._context.learner.optimizers[0].param_groups),
                    global_step=self._trainer.global_step,
                    measures=before,
                    opens_epoch=opens_epoch,
                    logged_at=logged_at(self._trainer),
                    epoch=self._epoch,
                    window=self._trainer.accumulate_grad_batches,
                )
            )

    def _forget_measures(self) -> None:
        """Release the metrics and means that no remaining snapshot and no epoch needs."""
        after = {one.step for one in self._context.ring.all()}
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

    def since(self, snapshot: Snapshot, number: int, faulty: int) -> list[KeptUpdate] | None:
        """The updates after a snapshot; ``None`` if one is not kept or cannot be repeated.

        Args:
            snapshot: The snapshot.
            number: The last of the updates.
            faulty: The update of the present fault. All updates before it that were skipped stay skipped.
        """
        if not self._possible:
            return None
        updates = [one for one in self._kept if snapshot.step < one.number <= number]
        numbers, first = [one.number for one in updates], self._first_after(snapshot)
        tensors = any(isinstance(value, Tensor) for one in updates for group in one.groups for value in group.values())
        if not all(one.micros or self.was_skipped(one, faulty) for one in updates):
            return None
        return None if tensors or numbers != list(range(first, number + 1)) else updates

    def was_skipped(self, update: KeptUpdate, faulty: int) -> bool:
        """Whether the run skipped an update. The one with the present fault does not count as skipped."""
        return update.number < faulty and update.number in self._context.state.skipped

    def ended_with(self, number: int) -> Iterator[int]:
        """The epochs whose last update so far is the given one."""
        return (epoch for last, epoch in (*self._ends, (self._context.state.step, self._epoch)) if last == number)

    def clear(self) -> None:
        """Release all updates, because they cannot be repeated."""
        self._kept.clear()


def _holds_more(tensor: Tensor) -> bool:
    """Whether a tensor keeps more than its numbers in memory: a graph, or a file of shared memory."""
    try:
        return tensor.grad_fn is not None or (tensor.is_cpu and tensor.is_shared())  # type: ignore[no-untyped-call]
    except NotImplementedError:  # not supported for sparse tensors
        return True
