"""What the parts that run steps again share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from lightning_nanguard.guard.guard import Guard
from lightning_nanguard.guard.step_check import StepCheck
from lightning_nanguard.state.step_start import StepMemory
from lightning_nanguard.thresholds.batches import RepeatedStepsThresholds
from lightning_nanguard.trainer.batch_replay import TrainerBatchReplay
from lightning_nanguard.trainer.private.packages import LightningModule, Trainer
from lightning_nanguard.trainer.repeat.numeric_errors import NumericErrors
from lightning_nanguard.trainer.repeat.window import Window
from lightning_nanguard.trainer.sample_keeper import SampleKeeper


@final
@dataclass(frozen=True, slots=True)
class RepeatParts:
    """What the parts that run steps again share.

    Attributes:
        trainer: The trainer.
        module: Its module.
        guard: The guard.
        replay: Keeps the batches, and makes what undoes a micro-batch.
        listens: Says which callback is the guard's.
        window: The micro-batches of the present update.
        memory: What is remembered before a step.
        errors: Knows which exceptions NaN or Inf caused.
        keeper: Gives the good samples of a bad batch; ``None`` if those are not to be kept.
    """

    trainer: Trainer
    module: LightningModule
    guard: Guard
    replay: TrainerBatchReplay
    listens: Callable[[Any], bool]
    window: Window
    memory: StepMemory
    errors: NumericErrors
    keeper: SampleKeeper | None

    @property
    def check(self) -> StepCheck:
        """Checks losses and gradients."""
        return self.guard.steps


def made_parts(
    trainer: Trainer,
    module: LightningModule,
    guard: Guard,
    replay: TrainerBatchReplay,
    listens: Callable[[Any], bool],
    thresholds: RepeatedStepsThresholds,
    keeper: SampleKeeper | None,
) -> RepeatParts:
    """Make the parts of one fit.

    Args:
        trainer: The trainer.
        module: Its module.
        guard: The guard.
        replay: Keeps the batches.
        listens: Says which callback is the guard's.
        thresholds: What is remembered before a step.
        keeper: Gives the good samples of a bad batch.
    """
    window, memory = Window(trainer, guard.steps, thresholds), StepMemory(module, thresholds)
    errors = NumericErrors(trainer, module, guard, replay)
    return RepeatParts(trainer, module, guard, replay, listens, window, memory, errors, keeper)
