"""Gives the guard access to a Trainer's loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from lightning_nanguard.diagnosis.case import Look
from lightning_nanguard.guard.loop import Clock
from lightning_nanguard.record.dispatch import SinkDispatcher
from lightning_nanguard.trainer.batch_replay import TrainerBatchReplay
from lightning_nanguard.trainer.diagnostics import Diagnostics
from lightning_nanguard.trainer.private.clock import expected_updates
from lightning_nanguard.trainer.private.packages import LightningModule, Trainer
from lightning_nanguard.types import SUSPICION, Evidence, Fault, Finding, Intervention


@final
@dataclass(frozen=True)
class TrainerLoop:
    """Answers what the guard asks of the loop; a :class:`~lightning_nanguard.guard.loop.TrainingLoop`.

    Attributes:
        trainer: The trainer.
        module: Its module.
        replay: Keeps the present batch.
        diagnostics: Finds causes.
        sinks: Where records go.
        run_id: Id of the run, which each record is given.
    """

    trainer: Trainer
    module: LightningModule
    replay: TrainerBatchReplay
    diagnostics: Diagnostics
    sinks: SinkDispatcher
    run_id: str

    def clock(self) -> Clock:
        """The present ``global_step``, epoch and batch index."""
        batch_idx, epoch = self.replay.batch_idx, self.replay.epoch
        return self.trainer.global_step, self.trainer.current_epoch if batch_idx < 0 else epoch, batch_idx

    def updates_left(self) -> float:
        """Number of updates that the run will still make; ``math.inf`` if that is not known."""
        return expected_updates(self.trainer) - self.trainer.global_step

    def micro_batches(self) -> int:
        """The number of micro-batches by which the loss is divided."""
        return self.trainer.accumulate_grad_batches if self.module.automatic_optimization else 1

    def record(self, intervention: Intervention) -> None:
        """Give the record to every sink."""
        self.sinks.write(replace(intervention, run=self.run_id))
        self.diagnostics.note(intervention)

    def advise(self, finding: Finding, clock: Clock | None = None) -> None:
        """Give advice about a suspicion that the guard does not act on."""
        self.diagnostics.advise(SUSPICION, finding, None if clock is None else clock[0])

    def diagnose(self, fault: Fault, evidence: Evidence, look: Look, update: int) -> Finding | None:
        """Find the cause of an update's fault; ``None`` if none was found."""
        return self.diagnostics.diagnose(fault, evidence, look, update)
