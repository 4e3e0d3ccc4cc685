"""How many updates lie between snapshots."""

from __future__ import annotations

import math
import time
from typing import final


@final
class Interval:
    """Updates between snapshots, so that they take at most a share of the run's time, and less as the run goes on.

    Of a run that has come through ``made`` updates, snapshots that cost as much as ``cost`` updates lose least, taken
    and missed together, at every ``sqrt(2 * cost * made)`` updates (Young 1974, doi:10.1145/361147.361115).

    Args:
        every: A fixed interval; ``None`` measures.
        share: The share.
    """

    _first = 16
    _longest = 1 << 14

    def __init__(self, every: int | None, share: float = 0.01) -> None:
        self._fixed = every is not None
        self._share = share
        self._update = 0.0
        self._capturing = 0.0
        self._certifying = 0.0
        self._on_device = 0.0
        self._mark = time.perf_counter()
        self.updates = every if every is not None else self._first

    def until_next(self, last: int, every: int | None = None) -> int:
        """Updates after which a snapshot is due.

        Early in a run a long interval would lose most of what was learned, so it grows with the run: the few snapshots
        more take a twentieth of the first interval's time at most.

        Args:
            last: Updates made before the last one was taken.
            every: The interval, if another than the one measured here.
        """
        every = self.updates if every is None else every
        return every if self._fixed else min(every, max(self._first, every // 8, last))

    def measure(self, started: float, since: int, made: int) -> None:
        """A capture that began at ``started``, after ``made`` updates and ``since`` the last, has just ended."""
        ended = time.perf_counter()
        update = (started - self._mark) / max(1, since)
        self._mark = ended
        if self._fixed or update <= 0:
            return
        self._update = _least(update, self._update)
        self._capturing = _least(ended - started, self._capturing)
        cost = (self._capturing + self._certifying + self._on_device) / self._update
        wanted = max(cost / self._share, math.sqrt(2 * cost * made))
        # In powers of two: small differences must not move it.
        power = 1 << max(0, math.ceil(math.log2(max(wanted, 1.0))))
        self.updates = min(max(self._first, power), self._longest)

    def certified(self, seconds: float) -> None:
        """A pending snapshot was looked at for so long."""
        self._certifying = _least(seconds, self._certifying)

    def took_device(self, seconds: float) -> None:
        """A capture has taken the device, which the host's clock does not see, for so long."""
        self._on_device = _least(seconds, self._on_device)


def _least(seconds: float, before: float) -> float:
    # Of the times seen the smallest: one slow moment must not set the pace.
    return min(seconds, before) if before else seconds
