"""When snapshots are taken, where they lie, and what speaks against certifying one."""

from __future__ import annotations

import logging
import time
from typing import final

import torch

from lightning_nanguard.events import Fault
from lightning_nanguard.investigate import Investigator
from lightning_nanguard.learner import Learner
from lightning_nanguard.ring import Interval, Ring
from lightning_nanguard.snapshot import Snapshot, capture, jumped

_logger = logging.getLogger("lightning_nanguard")

# Healthy updates after which running statistics no longer come from their initial values, and growth from snapshot
# to snapshot beyond which they cannot be right.
_SETTLED = 100
_FAR = 1e4
_FAR_EARLY = 1e12


@final
class Keeper:
    """Takes snapshots of the learner and looks at them before they are certified.

    Args:
        learner: What is kept.
        ring: Where snapshots go.
        investigator: Knows what is not finite by design.
        every: Updates between snapshots; ``None`` chooses so that they take at most 1 % of the time.
        device: Where snapshots lie; ``None`` beside the originals.
    """

    def __init__(
        self,
        learner: Learner,
        ring: Ring,
        investigator: Investigator,
        *,
        every: int | None,
        device: torch.device | None,
    ) -> None:
        self._learner = learner
        self._ring = ring
        self._investigator = investigator
        self._device = device
        self._interval = Interval(every)
        self._last = 0
        self._jumps: set[str] = set()

    def count_from(self, step: int) -> None:
        """The next snapshot is due an interval after update ``step``."""
        self._last = step

    def due(self, step: int) -> bool:
        """Whether a snapshot should be taken after update ``step``."""
        return self._ring.pending is None and self._interval.due(step - self._last)

    def capture(self, step: int, global_step: int, rate: float | None) -> Snapshot:
        """Take a snapshot, which is then pending.

        Args:
            step: The guard's clock.
            global_step: The trainer's.
            rate: Effective learning rate of the first group.
        """
        started, since = time.perf_counter(), step - self._last
        self._ring.drop_pending()
        try:
            snapshot = self._copy(step, global_step)
        except torch.cuda.OutOfMemoryError:
            _logger.warning(
                "NaNGuard: the device has no room for another snapshot at step %d. From now on snapshots lie in host "
                "memory; set snapshot_device='cpu' or max_snapshot_memory to choose this from the start.",
                global_step,
            )
            self._ring.shed()
            self._device = torch.device("cpu")
            snapshot = self._copy(step, global_step)
        snapshot.rate = rate
        self._ring.add(snapshot)
        self._last = step
        if since > 0:
            self._interval.measure(started, since)
        return snapshot

    def _copy(self, step: int, global_step: int) -> Snapshot:
        return capture(self._learner, step=step, global_step=global_step, device=self._device, reuse=self._ring.spare())

    def objection(self, pending: Snapshot, healthy_steps: int) -> Fault | None:
        """What speaks against certifying ``pending``, ``None`` if nothing does."""
        started = time.perf_counter()
        fault = self._objection(pending, healthy_steps)
        self._interval.certified(time.perf_counter() - started)
        return fault

    def _objection(self, pending: Snapshot, healthy_steps: int) -> Fault | None:
        bad = self._investigator.corrupt(pending.leaves.items())
        if bad is not None:
            message = f"{bad} is no longer finite, though every loss and gradient is"
            return Fault("corrupted_state", "state", bad, None, message)
        if not self._ring.certified:
            return None
        # A batch far out of range may pass through batch norm unseen, and leave its statistics useless.
        times = _FAR if healthy_steps > _SETTLED else _FAR_EARLY
        far = jumped(pending.leaves, self._ring.certified[0].leaves, self._learner.statistics(), times)
        if far is None or far in self._jumps:
            return None
        self._jumps.add(far)  # once: what comes back after a restore is how it is
        return Fault("implausible_state", "state", far, None, f"{far} is over {times:g} times what it was")
