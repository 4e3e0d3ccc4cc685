"""The parts of a guard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lightning_nanguard.act.skip import StepSkipper
from lightning_nanguard.checkpoints.saving import SaveGuard
from lightning_nanguard.guard.bad_start import BadStart
from lightning_nanguard.guard.beside import Beside
from lightning_nanguard.guard.caution import Caution
from lightning_nanguard.guard.certification import Certification
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.hyperparameter_watch import HyperparameterWatch
from lightning_nanguard.guard.investigator import Investigator
from lightning_nanguard.guard.loop import TrainingLoop
from lightning_nanguard.guard.meter import Meter
from lightning_nanguard.guard.outlier_watch import OutlierWatch
from lightning_nanguard.guard.rank_readback import Readback
from lightning_nanguard.guard.reading_judge import ReadingJudge
from lightning_nanguard.guard.recorder import InterventionRecorder
from lightning_nanguard.guard.recovery import Recovery
from lightning_nanguard.guard.snapshot_manager import SnapshotManager
from lightning_nanguard.guard.step_parts import StepParts
from lightning_nanguard.state.plausibility import PlausibilityCheck


@final
@dataclass(frozen=True, slots=True)
class GuardParts:
    """The parts of a guard, as :func:`~lightning_nanguard.guard.build.build_guard` puts them together.

    Attributes:
        context: Objects and settings that the parts of the guard share.
        loop: The training loop.
        meter: Measures loss and gradient norm.
        readback: Brings readings from the device to the host.
        caution: Decides which updates are read before they are made although readback is deferred.
        skipper: Skips updates.
        snapshots: Takes and checks snapshots.
        plausibility: Finds tensors that are finite and far out of range.
        bad_start: Knows what was not finite before the first update.
        certification: Decides when snapshots are taken and certified.
        investigator: Gathers evidence.
        judge: Separates healthy readings from faults.
        recovery: Cuts the rate, clips, and ends both again.
        hyperparameters: Replaces invalid learning rates and other hyperparameters.
        outliers: Gives advice about single updates whose numbers are far from those around them.
        recorder: Makes records.
        saving: Checks checkpoints before they are written.
        beside: Trains other states beside the run, to compare them with it.
        steps: What a loop needs to make a step again.
    """

    context: GuardContext
    loop: TrainingLoop
    meter: Meter
    readback: Readback
    caution: Caution
    skipper: StepSkipper
    snapshots: SnapshotManager
    plausibility: PlausibilityCheck
    bad_start: BadStart
    certification: Certification
    investigator: Investigator
    judge: ReadingJudge
    recovery: Recovery
    hyperparameters: HyperparameterWatch
    outliers: OutlierWatch
    recorder: InterventionRecorder
    saving: SaveGuard
    beside: Beside
    steps: StepParts
