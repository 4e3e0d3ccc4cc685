"""What a loss shape is judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


def loss_unit(first: float) -> float:
    """The unit that differences of losses are measured in: the size of the untrained model's loss."""
    return max(abs(first), 1e-12)


@final
@dataclass(frozen=True, slots=True)
class LossView:
    """The loss history of one optimizer at one reading, for the pure functions that judge it.

    Attributes:
        losses: The accepted losses and, last, that of the reading to judge.
        first: The untrained model's loss.
        best: The lowest loss level so far; ``first`` where there is none yet.
        highest: The highest accepted loss since the start or the last rollback, ``None`` before one was accepted.
        since: Losses accepted since the start or the last rollback.
        factor: Loss units above the untrained model's loss that count as far above.
        patience: Readings over which a settled loss is judged.
    """

    losses: tuple[float, ...]
    first: float
    best: float
    highest: float | None
    since: int
    factor: float
    patience: int

    @property
    def loss(self) -> float:
        """The loss to judge."""
        return self.losses[-1]

    @property
    def unit(self) -> float:
        """The unit that differences of losses are measured in."""
        return loss_unit(self.first)

    @property
    def learned(self) -> float:
        """How far the best level lies below the untrained model's loss."""
        return self.first - self.best

    def newest(self, count: int) -> tuple[float, ...]:
        """The newest ``count`` losses, the one to judge last."""
        return self.losses[-count:]
