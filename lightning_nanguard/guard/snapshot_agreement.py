"""The reports of ranks about their snapshots, so that all of them certify the same ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, final

from lightning_nanguard.distributed.ranks import Ranks, checksums
from lightning_nanguard.distributed.report import Report, minority_ranks
from lightning_nanguard.state.learner import StateKey
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.types import Fault

_logger = logging.getLogger("lightning_nanguard")


@final
class SnapshotAgreement:
    """Collects the verdicts of all ranks about the pending snapshot, for the snapshot manager of each rank.

    Args:
        ranks: All processes.
        interval: Updates between snapshots, until the ranks have reported theirs.
    """

    def __init__(self, ranks: Ranks, interval: int) -> None:
        self._ranks = ranks
        self.interval = interval
        """The longest interval that a rank has chosen. All ranks use it."""
        # What this rank says of the pending snapshot: its step, why it cannot be certified, and the checksums of its
        # parameters and moments.
        self._step = -1
        self._objection: Fault | None = None
        self._sums = (0, 0)
        self._heard: Sequence[Report] = ()
        self._equal = False
        self._were_equal: set[str] = set()
        self._parted_before: set[str] = set()

    def judge(self, pending: Snapshot, leaves: Mapping[StateKey, Any], objection: Fault | None) -> None:
        """Store the verdict of this rank about the pending snapshot. The next report sends it to the other ranks.

        Args:
            pending: The snapshot.
            leaves: The present leaves of the learner. They equal the snapshot, whose copy may not have arrived yet.
            objection: Why it cannot be certified.
        """
        self._step, self._objection = pending.step, objection
        self._sums = (0, 0) if self._ranks.sharded else checksums(leaves)

    def tell(self) -> tuple[int, bool, int, int]:
        """For a :class:`Report`: step of the snapshot judged, whether this rank objects, and the two checksums."""
        return self._step, self._objection is not None, *self._sums

    def hear(self, reports: Sequence[Report]) -> bool:
        """Take the reports of all ranks; return whether the interval has changed."""
        self._heard = reports
        before, self.interval = self.interval, max([one.snapshot_interval for one in reports])
        return self.interval != before

    def judged(self, pending: Snapshot) -> bool:
        """Whether all ranks have reported their verdict about ``pending``."""
        return all(one.pending_step == pending.step for one in self._heard)

    def objection(self, pending: Snapshot) -> tuple[Fault | None, tuple[int, ...]]:
        """Why ``pending`` cannot be certified, and the ranks concerned; ``None`` if it can be.

        All ranks must call it.
        """
        objecting = tuple(rank for rank, one in enumerate(self._heard) if one.rejects_pending)
        if objecting:
            mine = self._objection
            told: list[dict[str, Any]] = self._ranks.gather(None if mine is None else asdict(mine))
            return Fault(**told[objecting[0]]), objecting
        return (None, ()) if self._ranks.sharded else self._parted(pending)

    def share(self) -> bool:
        """Whether each rank keeps only a part of the snapshot, because it was equal on all ranks."""
        return self._ranks.snapshot_parts > 1 and self._equal

    def _parted(self, pending: Snapshot) -> tuple[Fault | None, tuple[int, ...]]:
        self._equal = True
        for name, sums in (
            ("parameters", [one.parameter_checksum for one in self._heard]),
            ("optimizer state", [one.optimizer_checksum for one in self._heard]),
        ):
            if len(set(sums)) == 1:
                if sums[0]:
                    self._were_equal.add(name)
                continue
            self._equal = False
            if name not in self._were_equal:
                continue  # a sharded optimizer, or parameters that were never synchronised
            self._were_equal.remove(name)
            if name not in self._parted_before:
                self._parted_before.add(name)
                message = f"the {name} of the ranks, which were equal before, differ at step {pending.global_step}"
                return Fault("parted_ranks", "state", name, None, message), minority_ranks(sums)
            # Values that differ again after a restore are made different by the run itself.
            if self._ranks.rank == 0:
                _logger.warning(
                    "NaNGuard: the %s of the ranks differ again at step %d. From now on each rank keeps whole "
                    "snapshots of its own and goes back to them. Look for updates that are not synchronised, or for "
                    "different kinds of devices in one run.",
                    name,
                    pending.global_step,
                )
        return None, ()
