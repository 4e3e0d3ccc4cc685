"""The objects that the classes of this package share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lightning_nanguard.guard.guard import Guard
from lightning_nanguard.guard.step_check import StepCheck
from lightning_nanguard.state.step_start import StepMemory
from lightning_nanguard.trainer.batch_replay import TrainerBatchReplay
from lightning_nanguard.trainer.private.callbacks import IsGuard
from lightning_nanguard.trainer.private.packages import LightningModule, Trainer
from lightning_nanguard.trainer.repeat.numeric_errors import NumericErrors
from lightning_nanguard.trainer.repeat.window import Window
from lightning_nanguard.trainer.sample_keeper import SampleKeeper


@final
@dataclass(frozen=True, slots=True)
class RepeatParts:
    """The objects that the classes which repeat steps share.

    Attributes:
        trainer: The trainer.
        module: Its module.
        guard: The guard.
        replay: Keeps the batches, and makes the objects that undo a micro-batch.
        is_guard: Says whether a callback is the guard.
        window: The micro-batches of the present update.
        memory: Saves the state before a step.
        errors: Finds out whether NaN or Inf caused an exception.
        keeper: Gives the good samples of a bad batch; ``None`` if bad batches are skipped as a whole.
    """

    trainer: Trainer
    module: LightningModule
    guard: Guard
    replay: TrainerBatchReplay
    is_guard: IsGuard
    window: Window
    memory: StepMemory
    errors: NumericErrors
    keeper: SampleKeeper | None

    @property
    def check(self) -> StepCheck:
        """Checks losses and gradients."""
        return self.guard.steps.check


def made_parts(
    trainer: Trainer,
    module: LightningModule,
    guard: Guard,
    replay: TrainerBatchReplay,
    is_guard: IsGuard,
    keeper: SampleKeeper | None,
) -> RepeatParts:
    """Make the shared objects of one fit.

    Args:
        trainer: The trainer.
        module: Its module.
        guard: The guard.
        replay: Keeps the batches.
        is_guard: Says whether a callback is the guard.
        keeper: Gives the good samples of a bad batch.
    """
    thresholds = guard.context.thresholds.batches.repeated
    window, memory = Window(trainer, guard.steps.undos, thresholds), StepMemory(module, thresholds)
    errors = NumericErrors(trainer, module, guard, replay)
    return RepeatParts(trainer, module, guard, replay, is_guard, window, memory, errors, keeper)
