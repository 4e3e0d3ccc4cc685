"""The objects and settings that all parts of one guard share."""

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
from lightning_nanguard.record.bad_samples import KnownSamples
from lightning_nanguard.record.curve import CurveFile
from lightning_nanguard.record.fit_log import FitLog
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
        snapshot_device: Where snapshots are kept; ``None`` for the device of the originals.
        snapshot_bytes: Limit in bytes for snapshots and stored batches together.
        choose_place: Whether snapshots move to host memory if the device has no room for them.
        deferred: Whether readback is deferred.
        observe: Whether the guard only records what it would do, and changes nothing.
        act_on: Whether finite suspicions change the run (``"evidence"``) or are advice (``"certain"``).
        clock: Gives the time in seconds, to measure the interval between snapshots.
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
    """The objects and settings that all parts of one guard share.

    Attributes:
        learner: The learner of the run.
        replay: Runs batches again.
        monitors: Detectors and histories, by optimizer.
        rate: The learning rate's multiplier.
        clipper: Clips gradients once that is turned on.
        ring: Stores the snapshots.
        ranks: All processes of the run.
        finite: Finds tensors of the learner that are not finite.
        state: Counts and other state.
        settings: How the guard works.
        thresholds: All thresholds.
        norms: Gradient norms of the newest updates, layer by layer.
        curve: Stores the readings of all updates in a file; ``None`` stores none.
        samples: The bad samples found so far.
        receipts: Whether interventions in a run with finite numbers helped.
        trials: The results of trials.
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
    receipts: FitLog[Receipt] = field(default_factory=lambda: FitLog(Receipt.told))
    trials: FitLog[HeldTrial] = field(default_factory=lambda: FitLog(HeldTrial.told))

    def corrupt(self) -> tuple[str | None, tuple[int, ...]]:
        """The first tensor of the learner that has become non-finite since the start, and the ranks where it has.

        All ranks must call it at the same point. It waits for the device.
        """
        return first_over_ranks(self.ranks, self.finite.corrupt(self.learner.leaves()))

    @property
    def acts_alone(self) -> bool:
        """Whether the guard may change the run without other ranks: one process, whole parameters, not ``observe``."""
        return not (self.many or self.ranks.sharded or self.settings.observe)

    @property
    def many(self) -> bool:
        """Whether there are several processes."""
        return self.ranks.world > 1
