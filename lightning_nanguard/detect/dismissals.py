"""Silences suspicions that proved to be false alarms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import final

from lightning_nanguard.thresholds.detection import DismissalThresholds


@final
class Dismissals:
    """Silences a suspicion after a false alarm, for longer each time, because each suspicion costs time to look into.

    Each kind of suspicion is silenced by itself. A suspicion whose loss is many times that of the dismissed one is
    raised all the same.

    Args:
        thresholds: For how many readings, and up to which loss; ``None`` for the defaults.

    Example:
        >>> dismissed = Dismissals()
        >>> dismissed.add("stuck_loss", step=100, loss=2.3)
        >>> [dismissed.silences("stuck_loss", step, 2.3) for step in (101, 124, 125)]
        [True, True, False]
    """

    def __init__(self, thresholds: DismissalThresholds | None = None) -> None:
        self._thresholds = thresholds or DismissalThresholds()
        # By kind: the step at which silence ends, the length of the next pause, and the dismissed loss.
        self._by_kind: dict[str, tuple[float, ...]] = {}

    def silences(self, kind: str, step: int, loss: float) -> bool:
        """Whether a suspicion is not to be raised at this step."""
        until, _, dismissed = self._by_kind.get(kind, (-math.inf, 0, 0))
        return step < until and not loss > self._thresholds.far_higher * abs(dismissed)

    def add(self, kind: str, step: int, loss: float, longest_pause: int | None = None) -> None:
        """Silence a suspicion that was a false alarm.

        Args:
            kind: Kind of its fault.
            step: When it was raised.
            loss: The loss at which it was raised.
            longest_pause: Most readings of a pause of this kind; ``None`` for the value in the thresholds.
        """
        own = self._thresholds
        _, pause, _ = self._by_kind.get(kind, (0, own.first_pause, 0))
        longest = own.longest_pause if longest_pause is None else longest_pause
        self._by_kind[kind] = (step + pause, min(own.growth * pause, longest), loss)

    def clear(self) -> None:
        """Forget all of them."""
        self._by_kind.clear()

    def state(self) -> dict[str, list[float]]:
        """Plain containers for a checkpoint."""
        return {kind: list(values) for kind, values in self._by_kind.items()}

    def load(self, state: Mapping[str, Iterable[float]]) -> None:
        """The inverse of :meth:`state`."""
        self._by_kind = {kind: tuple(values) for kind, values in state.items()}
