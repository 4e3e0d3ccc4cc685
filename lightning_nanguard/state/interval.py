"""Chooses the number of updates between snapshots."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import final

from lightning_nanguard.thresholds.snapshots import IntervalThresholds

_DEFAULTS = IntervalThresholds()


@final
class Interval:
    """Chooses the number of updates between snapshots, so that snapshots take at most a share of the run's time.

    Let a snapshot cost as much time as ``cost`` updates, and let the run have made ``made`` updates. The time lost to
    snapshots and to one restore is then least with a snapshot every ``sqrt(2 * cost * made)`` updates (Young 1974,
    doi:10.1145/361147.361115). So the share falls during the run.

    Args:
        every: A fixed interval; ``None`` chooses one by measurement.
        thresholds: Bounds of what is measured.
        clock: Gives the time in seconds.
    """

    def __init__(
        self,
        every: int | None,
        thresholds: IntervalThresholds = _DEFAULTS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._fixed = every is not None
        self._limits = thresholds
        self._clock = clock
        self._update = 0.0
        self._capturing = 0.0
        self._certifying = 0.0
        self._on_device = 0.0
        self._mark = clock()
        self.updates = every if every is not None else thresholds.first

    def resume(self, updates: int) -> None:
        """Continue with the interval of the run that was stopped, unless a fixed one is set."""
        if not self._fixed:
            self.updates = updates

    def until_next(self, last: int, every: int | None = None) -> int:
        """Updates until the next snapshot. There are fewer early in a run, where a long interval would lose most.

        Args:
            last: Updates made before the last snapshot.
            every: The interval, if not the one measured here.
        """
        every = self.updates if every is None else every
        return every if self._fixed else min(every, max(self._limits.first, every // self._limits.early_factor, last))

    def measure(self, started: float, since: int, made: int, once: float = 0.0) -> None:
        """Note a snapshot that has just been taken.

        Args:
            started: The time at which it began.
            since: Updates since the snapshot before.
            made: Updates made so far.
            once: Seconds of it that later snapshots do not need, such as for allocating memory.
        """
        ended = self._clock()
        update = (started - self._mark) / max(1, since)
        self._mark = ended
        if self._fixed or update <= 0:
            return
        self._update = _least(update, self._update)
        self._capturing = _least(max(0.0, ended - started - once), self._capturing)
        cost = (self._capturing + self._certifying + self._on_device) / self._update
        wanted = max(cost / self._limits.time_share, math.sqrt(2 * cost * made))
        # Round to powers of two, so that small differences do not change the interval.
        power = 1 << max(0, math.ceil(math.log2(max(wanted, 1.0))))
        # The first snapshots may take long for other reasons.
        longest = min(self._limits.longest, self.updates * self._limits.most_growth)
        self.updates = min(max(self._limits.first, power), longest)

    def certified(self, seconds: float) -> None:
        """Note the time that the check of a pending snapshot took."""
        self._certifying = _least(seconds, self._certifying)

    def took_device(self, seconds: float) -> None:
        """Note the time for which a snapshot occupied the device. The clock of the host does not measure it."""
        self._on_device = _least(seconds, self._on_device)


def _least(seconds: float, before: float) -> float:
    # Use the smallest time seen, so that one slow moment does not decide.
    return min(seconds, before) if before else seconds
