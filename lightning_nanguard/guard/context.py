"""What the parts of one guard share, given to each of them once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

import torch

from lightning_nanguard.act.clipping import Clipper
from lightning_nanguard.act.learning_rate import LearningRate
from lightning_nanguard.detect.monitors import Monitors
from lightning_nanguard.distributed.ranks import Ranks, SingleProcess, first_over_ranks
from lightning_nanguard.guard.loop import BatchReplay
from lightning_nanguard.guard.state import GuardState
from lightning_nanguard.measure.norm_history import NormHistory
from lightning_nanguard.record.curve import CurveFile
from lightning_nanguard.record.known_samples import KnownSamples
from lightning_nanguard.record.outcome_log import OutcomeLog
from lightning_nanguard.record.receipts import Receipt
from lightning_nanguard.record.trials import HeldTrial
from lightning_nanguard.state.finite import FiniteCheck
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.state.ring import Ring
from lightning_nanguard.thresholds import Thresholds
from lightning_nanguard.types import ActOn


@final
@dataclass(frozen=True, slots=True)
class Settings:
    """How a guard works, apart from detectors and remedies.

    Attributes:
        snapshot_every: Updates between snapshots; ``None`` chooses so that they take at most 1 % of the time.
        snapshot_device: Where snapshots are kept; ``None`` on the device of the originals.
        snapshot_bytes: Bytes that snapshots, and the batches that are kept, may take together.
        choose_place: Whether they go to host memory by themselves where the device has no room.
        deferred: Read late, without waiting for the device.
        observe: Record what would be done, change nothing.
        act_on: Whether finite suspicions change the run (``"evidence"``) or are advice (``"certain"``).
        clock: Seconds, by which the interval between snapshots is measured.
    """

    snapshot_every: int | None = None
    snapshot_device: torch.device | None = None
    snapshot_bytes: float = math.inf
    choose_place: bool = False
    deferred: bool = False
    observe: bool = False
    act_on: ActOn = "certain"
    clock: Callable[[], float] = time.perf_counter


@final
@dataclass(frozen=True, slots=True)
class GuardContext:
    """What the parts of one guard share.

    Attributes:
        learner: What is trained.
        replay: Runs batches again.
        monitors: Detectors and histories, by optimizer.
        rate: The learning rate's multiplier.
        clipper: Clips gradients once that is turned on.
        ring: The snapshots.
        ranks: All processes of the run.
        finite: Finds tensors of the learner that are not finite.
        state: Counts.
        settings: How the guard works.
        thresholds: All thresholds.
        norms: Gradient norms of the newest updates, layer by layer.
        curve: Keeps the readings of all updates in a file; ``None`` keeps none.
        samples: The bad samples met so far.
        receipts: Whether interventions in a run with finite numbers helped.
        trials: What the trials showed.
    """

    learner: Learner
    replay: BatchReplay
    monitors: Monitors
    rate: LearningRate
    clipper: Clipper = field(default_factory=Clipper)
    ring: Ring = field(default_factory=Ring)
    ranks: Ranks = field(default_factory=SingleProcess)
    finite: FiniteCheck = field(default_factory=FiniteCheck)
    state: GuardState = field(default_factory=GuardState)
    settings: Settings = field(default_factory=Settings)
    thresholds: Thresholds = field(default_factory=Thresholds)
    norms: NormHistory = field(default_factory=NormHistory)
    curve: CurveFile | None = None
    samples: KnownSamples = field(default_factory=KnownSamples)
    receipts: OutcomeLog[Receipt] = field(default_factory=OutcomeLog)
    trials: OutcomeLog[HeldTrial] = field(default_factory=OutcomeLog)

    def corrupt(self) -> tuple[str | None, tuple[int, ...]]:
        """The first tensor of the learner that is not finite and was at the start, and the ranks where it is so.

        All ranks have to call it at the same point; it waits for the device.
        """
        return first_over_ranks(self.ranks, self.finite.corrupt(self.learner.leaves()))

    @property
    def many(self) -> bool:
        """Whether there are several processes."""
        return self.ranks.world > 1
