"""The course of a run: what its newest losses and gradients show, and whether its loss moves. Without torch."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import final

from lightning_nanguard.detect.history import ReadingHistory
from lightning_nanguard.thresholds.diagnosis import DEFAULT, ExaminationThresholds, PlateauThresholds


@dataclass(frozen=True, slots=True)
class Course:
    """The course of a run over its newest updates, which were all finite.

    Attributes:
        updates: Number of these updates.
        first: Loss of the untrained model.
        before: Median loss at their start.
        now: Median loss at their end.
        spread: Median change of the level, up or down, from one eighth of these updates to the next.
        norm: Median gradient norm.
        opposed: Cosine of a batch's gradients before and after one update on it; ``None`` if it was not measured.
        noise: Norm of the gradient's noise divided by that of its mean; ``None`` if it was not measured.
        batches: Number of batches on which the noise was measured.
        clear: Mean of their gradients in standard errors of this mean.
        lr: Effective learning rate of the first group.
        batch_size: Samples in a batch; ``None`` if that is not known.
        chance: Loss of a model that knows nothing about the inputs; ``None`` if it is not known.
    """

    updates: int
    first: float
    before: float
    now: float
    spread: float
    norm: float
    opposed: float | None = None
    noise: float | None = None
    batches: int = 0
    clear: float = 0.0
    lr: float | None = None
    batch_size: int | None = None
    chance: float | None = None

    def moves(self, thresholds: PlateauThresholds = DEFAULT.plateau) -> bool:
        """Whether the loss has fallen, by more than it varies from one eighth of the updates to the next."""
        least = thresholds.moved * max(abs(self.first), 1e-12)
        return self.before - self.now > max(least, thresholds.spreads * self.spread)

    def falls(self, thresholds: PlateauThresholds = DEFAULT.plateau) -> bool:
        """Whether the loss falls clearly, by a share of its present level, even if this is little of the first loss."""
        least = thresholds.fallen * abs(self.before)
        return self.before - self.now > max(least, thresholds.spreads * self.spread)

    def rises(self, thresholds: PlateauThresholds = DEFAULT.plateau) -> bool:
        """Whether the loss has risen above its level: the loss function or the data changed, or the run diverges."""
        least = thresholds.risen * abs(self.first)
        return self.now - self.before > max(least, thresholds.spreads * self.spread)

    def high(self, thresholds: PlateauThresholds = DEFAULT.plateau) -> bool:
        """Whether most of the untrained model's loss is still there, or the loss is at chance level."""
        untrained = self.now > self.first - thresholds.learned * max(abs(self.first), 1e-12)
        return untrained or (self.chance is not None and self.now > thresholds.near_chance * self.chance)


@final
class LossProgress:
    """Takes the level of the loss several times in ``patience`` updates, and checks whether it moves.

    Args:
        patience: Number of updates within which the loss has to move.
        thresholds: How many levels are taken, and from how many losses each is computed.
        plateau: When a loss counts as not moving.
    """

    def __init__(
        self,
        patience: int,
        thresholds: ExaminationThresholds = DEFAULT.examination,
        plateau: PlateauThresholds = DEFAULT.plateau,
    ) -> None:
        self._patience = patience
        self._thresholds = thresholds
        self._plateau = plateau
        self._every = -(-patience // thresholds.levels)
        self._levels: deque[float] = deque(maxlen=thresholds.levels + 1)
        self._first: float | None = None
        self._next = thresholds.first_losses
        self._quiet_until = 0
        self._pause = patience

    @classmethod
    def of(cls, history: ReadingHistory, thresholds: ExaminationThresholds = DEFAULT.examination) -> LossProgress:
        """The progress of the newest losses only, if no levels were taken during the run."""
        losses = history.losses()
        size = max(1, len(losses) // (thresholds.levels + 1))
        made = cls(len(losses) or 1, thresholds)
        made._levels.extend(median(losses[start : start + size]) for start in range(0, len(losses), size))
        made._first = history.first
        return made

    def due(self, updates: int) -> bool:
        """Whether it is time to take the next level."""
        return updates >= self._next

    def take_level(self, updates: int, history: ReadingHistory) -> None:
        """Take the present level."""
        self._next = updates + self._every
        losses = history.losses()[-self._thresholds.level_losses :]
        if losses:
            level = median(losses)
            self._levels.append(level)
            # The first level is a median, because one loss of a small batch is too noisy.
            self._first = level if self._first is None else self._first

    def course(self, updates: int, history: ReadingHistory) -> Course | None:
        """The course of the loss so far; ``None`` before the first reading."""
        if not self._levels or self._first is None:
            return None
        levels = [*self._levels]
        third = max(1, len(levels) // 3)
        steps = [abs(one - other) for one, other in zip(levels[1:], levels, strict=False)]
        return Course(
            updates=min(updates, self._patience),
            first=self._first,
            before=median(levels[:third]),
            now=median(levels[-third:]),
            spread=median(steps) if steps else 0.0,
            norm=history.usual_norm() or 0.0,
        )

    def stuck(self, updates: int, course: Course) -> bool:
        """Whether the loss has not moved for ``patience`` updates. If it stays so, this is true less and less often."""
        early = len(self._levels) <= self._thresholds.levels
        if early or updates < self._quiet_until or course.moves(self._plateau):
            return False
        self._quiet_until = updates + self._pause
        self._pause *= 2
        return True
