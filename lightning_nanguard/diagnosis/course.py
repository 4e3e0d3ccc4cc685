"""The course of a run: what its newest losses and gradients show, standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_nanguard.thresholds.diagnosis import DEFAULT, PlateauThresholds


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
