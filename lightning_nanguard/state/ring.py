"""Stores the certified snapshots and the pending one."""

from __future__ import annotations

import math
from typing import final

from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.thresholds.snapshots import RingThresholds
from lightning_nanguard.types import Evidence


@final
class Ring:
    """Keeps certified snapshots, newest first, and the pending one.

    A full ring drops the oldest. It always keeps the newest one with about the best loss level. It also keeps the
    oldest one while no newer one is clearly better. A fault that is found late needs a state from before the fault.

    Args:
        capacity: Number of certified snapshots kept.
        thresholds: Which snapshots are kept.
    """

    def __init__(self, capacity: int = 3, thresholds: RingThresholds = RingThresholds()) -> None:
        self.capacity = capacity
        self._limits = thresholds
        self.certified: list[Snapshot] = []
        self.pending: Snapshot | None = None
        self.beside: Snapshot | None = None
        """A state trained beside the run, from which the run has continued; ``None`` once a newer one is certified."""
        self._spare: Snapshot | None = None

    @property
    def last_certified(self) -> Snapshot | None:
        """The newest certified snapshot; ``None`` without one."""
        return self.certified[0] if self.certified else None

    @property
    def latest(self) -> Snapshot | None:
        """The pending snapshot, or else the newest certified one; ``None`` if there is neither."""
        return self.pending or self.last_certified

    def all(self) -> list[Snapshot]:
        """The certified snapshots, newest first, and then the pending one."""
        return self.certified + ([] if self.pending is None else [self.pending])

    def origin(self) -> Snapshot | None:
        """The state that the present one was trained from, and is compared with; ``None`` if nothing was certified."""
        return self.beside or self.last_certified

    @property
    def certify_after(self) -> int:
        """Number of healthy readings after a snapshot before it is certified."""
        return self._limits.certify_after

    def spare(self) -> Snapshot | None:
        """A snapshot that is no longer needed, whose memory may be used again; ``None`` without one."""
        spare, self._spare = self._spare, None
        return spare

    def add(self, snapshot: Snapshot) -> None:
        """Make a new snapshot the pending one; an older pending one is dropped."""
        self.drop_pending()
        self.pending = snapshot

    def shed(self) -> None:
        """Free all certified snapshots but the newest, because there is too little memory."""
        self.pending = self.beside = self._spare = None
        del self.certified[1:]

    def shrink(self, capacity: int) -> None:
        """Keep fewer certified snapshots from now on. Keep the newest ones, and free the others."""
        self.capacity, self._spare = capacity, None
        del self.certified[capacity:]

    def drop_pending(self) -> None:
        """Drop the pending snapshot, because its state may be bad."""
        if self.pending is not None:
            self._recycle(self.pending)
            self.pending = None

    def healthy(self, step: int) -> bool:
        """Count a healthy reading of update ``step``; return whether the pending snapshot has waited long enough.

        A late reading of an update from before the snapshot is not counted.
        """
        if self.pending is None or step <= self.pending.step:
            return False
        self.pending.healthy += 1
        return self.pending.healthy >= self._limits.certify_after

    def certify(self, kept: Snapshot | None = None, *, loss_unit: float = 0.0, keep_oldest: bool = False) -> None:
        """Certify the pending snapshot.

        Args:
            kept: The snapshot to keep instead, such as this rank's part of it; ``None`` to keep the pending one.
            loss_unit: The unit of the loss, in which two loss levels are compared.
            keep_oldest: Whether to keep the oldest even if a newer one has a clearly better loss, since newer states
                may be bad although the loss does not show it.
        """
        assert self.pending is not None
        self.certified.insert(0, self.pending if kept is None else kept)
        if kept is not None and kept is not self.pending:
            self._recycle(self.pending)
        self.pending = self.beside = None
        if len(self.certified) > self.capacity:
            margin = self._limits.about_best * loss_unit
            self._recycle(self.certified.pop(self._least_worth(margin, keep_oldest)))

    def newest(self) -> Snapshot | None:
        """The newest certified snapshot. If nothing is certified yet, the pending one if it is whole."""
        if self.certified:
            return self.certified[0]
        return self.pending if self.pending is not None and self.pending.intact() else None

    def clear(self) -> None:
        """Free all snapshots."""
        self.pending = self.beside = self._spare = None
        self.certified.clear()

    def good(self, loss_unit: float) -> Snapshot | None:
        """The newest certified snapshot whose loss was about the best; ``None`` without one.

        Args:
            loss_unit: The unit of the loss.
        """
        certified = self.certified
        if not certified:
            return None
        known = [snapshot.level for snapshot in certified if snapshot.level is not None]
        limit = min(known, default=0.0) + self._limits.about_best * loss_unit
        return next((one for one in certified if one.level is None or one.level <= limit), certified[0])

    def good_for(self, evidence: Evidence) -> Snapshot | None:
        """The certified snapshot to go on from by some evidence: the start if a trial shows so, else a good one."""
        if evidence.trial is not None and evidence.trial.base == "start":
            return self.certified[-1] if self.certified else None
        return self.good(evidence.loss_unit)

    def discard_newer(self, depth: int) -> Snapshot:
        """Drop the ``depth`` newest and return the one that is then newest."""
        depth, self.beside = min(depth, len(self.certified) - 1), None
        for _ in range(depth):
            self._recycle(self.certified.pop(0))
        return self.certified[0]

    def _least_worth(self, margin: float, keep_oldest: bool) -> int:
        last = len(self.certified) - 1
        levels = [math.inf if snapshot.level is None else snapshot.level for snapshot in self.certified]
        # Keep the newest, the newest whose level is about the best, and, until a newer one is clearly better, the
        # oldest.
        good = next((i for i, level in enumerate(levels) if level <= min(levels) + margin), 0)
        unbeaten = keep_oldest or levels[last] < min(levels[:last]) + margin
        kept = {0, good, last} if unbeaten else {0, good}
        return next((index for index in range(last, 0, -1) if index not in kept), last)

    def _recycle(self, snapshot: Snapshot) -> None:
        # The memory of one whole state is enough. A split snapshot has only a part.
        if self._spare is None and not snapshot.shared():
            self._spare = snapshot
