"""Decides when a snapshot is taken, and when it counts as good (certified)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from lightning_nanguard.decide.recovery import prove
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.found import FoundFault
from lightning_nanguard.guard.investigator import Investigator, norms_to_grow_from
from lightning_nanguard.guard.loop import TrainingLoop
from lightning_nanguard.guard.snapshot_manager import SnapshotManager
from lightning_nanguard.measure.tensors import is_strided, local, shape_of
from lightning_nanguard.state.snapshot import Share, Snapshot
from lightning_nanguard.types import Reading


@final
@dataclass(eq=False)
class Certification:
    """Takes snapshots when they are due, and certifies the pending one if the readings after it were healthy.

    Args:
        context: Objects and settings that the parts of the guard share.
        loop: Gives the present ``global_step``.
        investigator: Stores the norms of the weights at the start.
        snapshots: Takes and checks snapshots.
    """

    context: GuardContext
    loop: TrainingLoop
    investigator: Investigator
    snapshots: SnapshotManager
    # Whether the first snapshot lacks parameters, because the first forward pass makes them.
    _lazy: bool = field(default=False, init=False)

    def start(self) -> None:
        """Take the first snapshot, which is certified when the first loss is healthy."""
        self._start(self.context.state.step, self.context.ring.certify_after - 1)

    def _start(self, step: int, healthy: int) -> None:
        context = self.context
        self._lazy = context.learner.lazy()
        if not self.investigator.initial_norms:
            self.investigator.initial_norms = norms_to_grow_from(context.learner.weights())
        context.ring.certified.clear()
        level = context.monitors.history(0).level()
        if not self.snapshots.resume(level, partial(self._capture, step)):
            first = self._capture(step)
            if first is not None:
                first.healthy = healthy

    def start_again_if_changed(self) -> None:
        """Take the first snapshot again if hooks before the first batch have changed the learner, and it is finite."""
        context = self.context
        first = context.ring.pending
        if first is None or context.ring.certified:
            return
        first.wait()
        changed = any(
            not _is_same(first.leaves[key], live) for key, live in context.learner.leaves() if key in first.leaves
        )
        if any(context.ranks.gather(changed)) and context.corrupt()[0] is None:
            self.start()
            self.snapshots.placement.settle()

    def start_again_if_lazy(self) -> None:
        """Take the first snapshot again if the first forward pass has made parameters."""
        if self._lazy and not self.context.learner.lazy():
            self.start()
            self.snapshots.placement.settle()

    def start_again_if_resized(self) -> bool:
        """Start again during an update, if a weight or buffer has another shape than in the newest snapshot.

        Older snapshots cannot be restored then. A state that is not finite is not used as a start.

        Returns:
            Whether a shape has changed.
        """
        context = self.context
        newest = context.ring.latest
        if newest is None:
            return False
        resized = any(_is_resized(newest.leaves.get(key), live) for key, live in context.learner.weights())
        if resized and context.corrupt()[0] is None:
            self.investigator.initial_norms = {}
            # One healthy reading certifies it. Uneasy detectors do not count: they compare with the old layers.
            self._start(context.state.step - 1, context.thresholds.snapshots.ring.certify_anyway - 1)
            self.snapshots.placement.settle()
        return resized

    def judge(self, readings: Sequence[Reading]) -> FoundFault | None:
        """Certify the pending snapshot if the newest readings show that it is good.

        Args:
            readings: Healthy readings of the batch that has just ended.

        Returns:
            Why the snapshot is not certified; ``None`` if nothing speaks against it.
        """
        context = self.context
        pending = context.ring.pending
        if pending is None or not context.ring.healthy(min(reading.step for reading in readings)):
            return None
        uneasy = context.monitors.uneasy(readings)
        if uneasy and pending.healthy < context.thresholds.snapshots.ring.certify_anyway:
            return None
        if not self.snapshots.judged(pending):
            return None
        if not self.snapshots.is_whole(pending):
            context.ring.drop_pending()
            return None
        fault, ranks = self.snapshots.objection(pending)
        if fault is not None:
            self.snapshots.mend_pending(fault.place)
            return FoundFault(fault, readings[-1], ranks=ranks)
        self._certify(pending, readings[0].optimizer_index)
        return None

    def _certify(self, pending: Snapshot, optimizer_index: int) -> None:
        context, state = self.context, self.context.state
        history = context.monitors.history(optimizer_index)
        pending.level = history.level()
        unit = history.loss_unit()
        keep_oldest = state.healthy_steps < context.thresholds.snapshots.ring.keep_start
        context.ring.certify(self.snapshots.kept(pending), loss_unit=unit, keep_oldest=keep_oldest)
        state.policy = replace(state.policy, unproven=())
        if history.learning():
            recovery = context.thresholds.decision.recovery
            state.policy = prove(pending.rate, pending.level, unit, state.policy, recovery)

    def capture_if_due(self) -> None:
        """Take a snapshot if one is due and none is pending."""
        if self.context.ring.pending is None and self.snapshots.due(self.context.state.step):
            self._capture(self.context.state.step)

    def _capture(self, step: int) -> Snapshot | None:
        global_step, _, _ = self.loop.clock()
        return self.snapshots.capture(step, global_step, self.context.rate.first())


def vouch_for_start(context: GuardContext, updates: int) -> None:
    """Certify the first snapshot if the state differs from it only in numbers that are no longer finite.

    Before the first update that was made, only code outside of the steps can have written these numbers. If it has
    changed finite numbers, too, such as by loading other weights, the snapshot is not the state to go back to. With
    several ranks nothing is certified in this way, because the others may not have this fault.

    Args:
        context: Objects and settings that the parts of the guard share.
        updates: Number of updates that may have been made.
    """
    first = context.ring.pending
    if first is None or context.ring.certified or not context.acts_alone:
        return
    if any(number not in context.state.skipped for number in range(first.step + 1, updates + 1)):
        return
    # The present batch may have changed buffers.
    live = {key: leaf for key, leaf in context.learner.leaves() if key[0] != "buffer"}
    if context.finite.corrupt(live.items()) is None:
        return
    first.wait()
    known = first.intact() and all(key in first.leaves for key in live)
    same = known and all(_is_same(first.leaves[key], leaf, where_finite=True) for key, leaf in live.items())
    if same and context.finite.corrupt(first.leaves.items()) is None:
        context.ring.certify()


def _is_same(saved: Any, live: Any, *, where_finite: bool = False) -> bool:
    """Whether two values are equal. Values that cannot be compared count as equal.

    Args:
        saved: The one value.
        live: The other value.
        where_finite: Whether to compare only elements that are finite in ``live``.
    """
    try:
        if not (isinstance(saved, Tensor) and isinstance(live, Tensor)):
            return bool(saved == live)
        saved, live = local(saved), local(live)
        if not (is_strided(saved) and is_strided(live)) or saved.shape != live.shape:
            return True
        equal = saved.to(live.device) == live
        return bool((equal | ~torch.isfinite(live) if where_finite else equal).all())
    except (RuntimeError, ValueError, TypeError):  # containers of tensors, and dtypes without a comparison
        return True


def _is_resized(saved: Any, live: Tensor) -> bool:
    if isinstance(saved, Share):
        return tuple(saved.shape) != shape_of(live)
    return isinstance(saved, Tensor) and shape_of(saved) != shape_of(local(live))
