"""Trying a learning rate out: a few updates on the batch at hand, from some state, that are undone again."""

from __future__ import annotations

import math
from typing import Protocol, final

import torch

from lightning_nanguard.distributed import Alone, Ranks
from lightning_nanguard.learner import Learner
from lightning_nanguard.learning_rate import LearningRate
from lightning_nanguard.snapshot import Snapshot, capture, restore


class Stage(Protocol):
    """What a rehearsal asks of the loop around."""

    def train_once(self) -> float | None:
        """One plain update on the batch at hand, outside the run's count; its loss before the update.

        ``None`` where that cannot be done.
        """

    def probe(self) -> float | None:
        """Loss of the batch at hand under the weights of now, leaving no trace; ``None`` where it cannot be had."""


@final
class Rehearsal:
    """Rehearses rates; learner, rates and gradients are afterwards as they were.

    Args:
        learner: What is trained.
        rate: The learning rate's multiplier.
        stage: The loop around.
        ranks: All processes; each rehearses on its own batch, and all go on from the mean.
    """

    _updates = 20
    _lower = (1 / 16, 1 / 256)

    def __init__(self, learner: Learner, rate: LearningRate, stage: Stage, ranks: Ranks | None = None) -> None:
        self._ranks: Ranks = Alone() if ranks is None else ranks
        self._learner = learner
        self._rate = rate
        self._stage = stage

    def losses(self, base: Snapshot, factor: float, updates: int) -> list[float] | None:
        """Loss of the batch before each update from ``base`` with the rate times ``factor``, and after the last.

        It ends early where the loss leaves. The learner is left at ``base``; ``None`` where it cannot be done.
        """
        rate = self._rate
        multiplier, min_lr, max_lr = rate.multiplier, rate.min_lr, rate.max_lr
        restore(self._learner, base)
        rate.set_multiplier(rate.ratio() * factor)
        losses: list[float] = []
        try:
            for _ in range(updates):
                loss = self._stage.train_once()
                if loss is None:
                    return None
                losses.append(loss)
                if not math.isfinite(loss) or loss > losses[0] + 10 * max(abs(losses[0]), 1e-12):
                    return losses
            last = self._stage.probe()
            return None if last is None else [*losses, last]
        finally:
            rate.set_multiplier(multiplier, min_lr=min_lr, max_lr=max_lr)
            restore(self._learner, base)
            for optimizer in self._learner.optimizers:
                optimizer.zero_grad(set_to_none=True)

    def lower_rate_is_better(self, start: Snapshot, scale: float) -> bool | None:
        """Whether a lower rate learns this batch from ``start``, and the present one from the present state does not.

        Args:
            start: A certified snapshot from before the trouble.
            scale: The loss's own scale: a fifth of it is a clear difference.
        """
        gradients = [(p, p.grad) for p in self._learner.module.parameters()]
        try:
            present = capture(self._learner, step=0, global_step=0)
        except torch.cuda.OutOfMemoryError:
            present = None
        if not all(self._ranks.gather(present is not None)) or present is None:
            return None
        try:
            here = self.losses(present, 1.0, self._updates)
            there = [self.losses(start, factor, self._updates) for factor in self._lower]
        finally:
            restore(self._learner, present)
            for parameter, gradient in gradients:
                parameter.grad = gradient
        ends = [losses[-1] for losses in there if losses is not None and math.isfinite(losses[-1])]
        if here is None or not ends:
            return None
        # It ends clearly lower, and where the present state stands the present rate brings next to nothing.
        end = here[-1] if math.isfinite(here[-1]) else math.inf
        return min(ends) < end - 0.2 * scale and here[0] - end < (here[0] - min(ends)) / 3
