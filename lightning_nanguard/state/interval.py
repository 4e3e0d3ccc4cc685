"""Chooses the number of updates between snapshots."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, final

from lightning_nanguard.thresholds.snapshots import IntervalThresholds


@final
class Interval:
    """Chooses the number of updates between snapshots, so that snapshots take at most a share of the run's time.

    Let a snapshot cost as much time as ``cost`` updates, and let ``between`` be the updates between two rollbacks. The
    time lost to snapshots and to rollbacks is then least with a snapshot every ``sqrt(2 * cost * between)`` updates
    (Young 1974, doi:10.1145/361147.361115). Until a rollback, ``between`` is the number of updates made. So the share
    falls during the run.

    Args:
        every: A fixed interval; ``None`` chooses one by measurement.
        thresholds: Bounds of what is measured.
        clock: Gives the time in seconds.
    """

    def __init__(
        self,
        every: int | None,
        thresholds: IntervalThresholds = IntervalThresholds(),
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
        self._between: float | None = None
        self._restored = 0
        self.updates = every if every is not None else thresholds.first

    def state_dict(self) -> dict[str, Any]:
        """The state in plain containers."""
        return {"updates": self.updates, "between": self._between, "restored": self._restored}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue with the interval of the run that was stopped, unless a fixed one is set."""
        self._between, self._restored = state["between"], state["restored"]
        if not self._fixed:
            self.updates = int(state["updates"])

    def restored(self, made: int) -> None:
        """Note a rollback.

        Args:
            made: Updates made so far.
        """
        since, self._restored = max(1, made - self._restored), made
        # The geometric mean follows within a few rollbacks if a device begins to fail after millions of updates.
        self._between = float(since) if self._between is None else math.sqrt(self._between * since)
        if not self._fixed and self._update:
            self.updates = min(self.updates, self._best(made))

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
        # The first snapshots may take long for other reasons.
        longest = min(self._limits.longest, self.updates * self._limits.most_growth)
        self.updates = min(self._best(made), longest)

    def _best(self, made: int) -> int:
        """The interval at which least time is lost."""
        between = made if self._between is None else max(self._between, made - self._restored)
        cost = (self._capturing + self._certifying + self._on_device) / self._update
        wanted = max(cost / self._limits.time_share, math.sqrt(2 * cost * between))
        # Round to powers of two, so that small differences do not change the interval.
        return max(self._limits.first, 1 << max(0, math.ceil(math.log2(max(wanted, 1.0)))))

    def certified(self, seconds: float) -> None:
        """Note the time that the check of a pending snapshot took."""
        self._certifying = _least(seconds, self._certifying)

    def took_device(self, seconds: float) -> None:
        """Note the time for which a snapshot occupied the device. The clock of the host does not measure it."""
        self._on_device = _least(seconds, self._on_device)


def _least(seconds: float, before: float) -> float:
    # Use the smallest time seen, so that one slow moment does not decide.
    return min(seconds, before) if before else seconds
