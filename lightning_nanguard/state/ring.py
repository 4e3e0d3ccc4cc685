"""The snapshots that are kept, certified and pending."""

from __future__ import annotations

import math
from typing import final

from lightning_nanguard.state.snapshot import Snapshot


@final
class Ring:
    """Certified snapshots, newest first, and the one still pending.

    When it is full, the oldest goes, but not the newest of about the best loss level, nor the start while nothing was
    learned: a fault found late needs a state from before it began.

    Args:
        capacity: Certified snapshots kept.
        certify_after: Healthy readings a pending snapshot waits for.
    """

    def __init__(self, capacity: int = 3, certify_after: int = 2) -> None:
        self.capacity = capacity
        self.certify_after = certify_after
        self.certified: list[Snapshot] = []
        self.pending: Snapshot | None = None
        self._spare: list[Snapshot] = []

    def spare(self) -> Snapshot | None:
        """Memory to use again, if there is some."""
        return self._spare.pop() if self._spare else None

    def add(self, snapshot: Snapshot) -> None:
        """Take a new snapshot, pending; the older pending one goes."""
        self.drop_pending()
        self.pending = snapshot

    def shed(self) -> None:
        """Let go of what can be spared: there is too little memory."""
        self.pending = None
        self._spare.clear()
        del self.certified[1:]
        self.capacity = 1

    def drop_pending(self) -> None:
        """The state it holds is under suspicion."""
        if self.pending is not None:
            self._recycle(self.pending)
            self.pending = None

    def healthy(self, step: int) -> bool:
        """Count a healthy reading of update ``step``; whether the pending snapshot has waited long enough.

        A reading of an update from before the snapshot, as deferred readback brings, says nothing about it.
        """
        if self.pending is None or step <= self.pending.step:
            return False
        self.pending.healthy += 1
        return self.pending.healthy >= self.certify_after

    def certify(self, margin: float = 0.0, kept: Snapshot | None = None, *, keep_oldest: bool = False) -> None:
        """The pending snapshot is good.

        Args:
            kept: The form in which it is kept, if another.
            margin: How much lower a newer snapshot's loss level must be before the oldest is worth less.
            keep_oldest: Keep the oldest all the same: what came since may be ruined without a sign in the loss.
        """
        assert self.pending is not None
        self.certified.insert(0, self.pending if kept is None else kept)
        if kept is not None and kept is not self.pending:
            self._recycle(self.pending)
        self.pending = None
        if len(self.certified) > self.capacity:
            self._recycle(self.certified.pop(self._least_worth(margin, keep_oldest)))

    def clear(self) -> None:
        """Let go of all memory."""
        self.pending = None
        self.certified.clear()
        self._spare.clear()

    def good(self, sound: int | None, loss_unit: float) -> Snapshot | None:
        """The certified snapshot to compare with; ``None`` without one.

        Args:
            sound: Depth of the one to take, where that is known; else it is the newest whose loss was about the best.
            loss_unit: The unit of the loss.
        """
        certified = self.certified
        if not certified:
            return None
        if sound is not None and sound < len(certified):
            return certified[sound]
        known = [snapshot.level for snapshot in certified if snapshot.level is not None]
        limit = min(known, default=0.0) + 0.1 * loss_unit
        return next((one for one in certified if one.level is None or one.level <= limit), certified[0])

    def discard_newer(self, depth: int) -> Snapshot:
        """Drop the ``depth`` newest and return the one that is then newest."""
        depth = min(depth, len(self.certified) - 1)
        for _ in range(depth):
            self._recycle(self.certified.pop(0))
        return self.certified[0]

    def _least_worth(self, margin: float, keep_oldest: bool) -> int:
        last = len(self.certified) - 1
        levels = [math.inf if snapshot.level is None else snapshot.level for snapshot in self.certified]
        # Worth keeping beside the newest: the newest whose level is about the best, and, until something newer is
        # clearly better, the oldest.
        good = next((i for i, level in enumerate(levels) if level <= min(levels) + margin), 0)
        unbeaten = keep_oldest or levels[last] < min(levels[:last]) + margin
        kept = {0, good, last} if unbeaten else {0, good}
        return next((index for index in range(last, 0, -1) if index not in kept), last)

    def _recycle(self, snapshot: Snapshot) -> None:
        # Only memory for the whole state is of use again.
        if len(self._spare) < 1 and not snapshot.shared():
            self._spare.append(snapshot)
