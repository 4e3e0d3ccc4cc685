"""The parts of a guard."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import final

from lightning_nanguard.act.skip import StepSkipper
from lightning_nanguard.checkpoints.saving import SaveGuard
from lightning_nanguard.guard.beside import Beside
from lightning_nanguard.guard.caution import Caution
from lightning_nanguard.guard.certification import Certification
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.hyperparameter_watch import HyperparameterWatch
from lightning_nanguard.guard.investigator import Investigator
from lightning_nanguard.guard.loop import TrainingLoop
from lightning_nanguard.guard.meter import Meter
from lightning_nanguard.guard.plan_runner import PlanRunner
from lightning_nanguard.guard.readback import Readback
from lightning_nanguard.guard.reading_judge import ReadingJudge
from lightning_nanguard.guard.recorder import InterventionRecorder
from lightning_nanguard.guard.recovery import Recovery
from lightning_nanguard.guard.snapshot_manager import SnapshotManager
from lightning_nanguard.guard.step_check import StepCheck
from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.state.plausibility import PlausibilityCheck


@final
@dataclass(frozen=True, slots=True)
class GuardParts:
    """The parts of a guard, as :func:`~lightning_nanguard.guard.build.build_guard` puts them together.

    Attributes:
        context: What all of them share.
        loop: The loop around.
        meter: Measures loss and gradient norm.
        readback: How readings arrive.
        caution: When an update is read before it is made although readings are deferred.
        skipper: Skips updates.
        snapshots: Takes and checks snapshots.
        plausibility: Finds what is finite and far out of range.
        certification: When a state counts as good.
        investigator: Gathers evidence.
        judge: Separates healthy readings from faults.
        runner: Carries plans out.
        recovery: Lower rates and clipping.
        rates: Replaces invalid learning rates.
        recorder: Makes records.
        saving: Checks checkpoints before they are written.
        beside: Trains other states beside the run, to compare them with it.
        steps: Looks at an update while it can still be made again.
        undos: One object for each batch that may still have to be undone.
    """

    context: GuardContext
    loop: TrainingLoop
    meter: Meter
    readback: Readback
    caution: Caution
    skipper: StepSkipper
    snapshots: SnapshotManager
    plausibility: PlausibilityCheck
    certification: Certification
    investigator: Investigator
    judge: ReadingJudge
    runner: PlanRunner
    recovery: Recovery
    rates: HyperparameterWatch
    recorder: InterventionRecorder
    saving: SaveGuard
    beside: Beside
    steps: StepCheck
    undos: deque[BatchUndo]
