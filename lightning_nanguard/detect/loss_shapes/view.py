"""The data from which the functions in this folder judge the shape of a loss."""

from __future__ import annotations

from typing import NamedTuple

from lightning_nanguard.detect.window import Window


def loss_unit(first: float) -> float:
    """The unit that differences of losses are measured in: the size of the untrained model's loss."""
    return max(abs(first), 1e-12)


class LossView(NamedTuple):
    """The loss history of one optimizer at one reading, for the pure functions that judge it.

    It is made for every reading that is not clearly healthy, so it is cheap: a named tuple that copies no losses.

    Attributes:
        loss: The loss to judge.
        accepted: The losses accepted before it; to be read only.
        first: The untrained model's loss.
        unit: The unit that differences of losses are measured in: the size of ``first``.
        best: The lowest loss level so far; ``first`` where there is none yet.
        highest: The highest accepted loss since the start or the last rollback, ``None`` before one was accepted.
        since: Losses accepted since the start or the last rollback.
        factor: Loss units above the untrained model's loss that count as far above.
        patience: Readings over which a settled loss is judged.
    """

    loss: float
    accepted: Window
    first: float
    unit: float
    best: float
    highest: float | None
    since: int
    factor: float
    patience: int

    @property
    def learned(self) -> float:
        """How far the best level lies below the untrained model's loss."""
        return self.first - self.best

    def newest(self, count: int) -> list[float]:
        """The newest ``count`` losses, the one to judge last."""
        return [*self.accepted.last(count - 1), self.loss]
