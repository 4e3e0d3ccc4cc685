"""The parts of a guard that a loop needs to make a step again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lightning_nanguard.guard.batch_undos import BatchUndos
from lightning_nanguard.guard.step_check import StepCheck
from lightning_nanguard.guard.step_records import StepRecords
from lightning_nanguard.guard.unused_batch import UnusedBatch


@final
@dataclass(frozen=True, slots=True)
class StepParts:
    """What a loop needs to make a step again.

    Attributes:
        check: Checks an update before it is made.
        undos: Undo what the present batch changed.
        records: Records steps that the loop made again, or made from a part of their data.
        unused: Undoes batches in which no optimizer steps.
    """

    check: StepCheck
    undos: BatchUndos
    records: StepRecords
    unused: UnusedBatch
