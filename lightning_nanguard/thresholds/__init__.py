"""All thresholds, one file per topic: frozen dataclasses, standard library only.

A part is given the thresholds it uses, so a test or an experiment sets one without patching::

    NaNGuard(thresholds=Thresholds(snapshots=SnapshotsThresholds(...)))
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_nanguard.thresholds.batches import BatchesThresholds
from lightning_nanguard.thresholds.checkpoints import CheckpointsThresholds
from lightning_nanguard.thresholds.decision import DecisionThresholds
from lightning_nanguard.thresholds.detection import DetectionThresholds
from lightning_nanguard.thresholds.diagnosis import DiagnosisThresholds
from lightning_nanguard.thresholds.distributed import DistributedThresholds
from lightning_nanguard.thresholds.measurement import MeasurementThresholds
from lightning_nanguard.thresholds.rate_search import RateSearchThresholds
from lightning_nanguard.thresholds.records import RecordsThresholds
from lightning_nanguard.thresholds.samples import SamplesThresholds
from lightning_nanguard.thresholds.snapshots import SnapshotsThresholds
from lightning_nanguard.thresholds.trial import TrialThresholds

__all__ = [
    "BatchesThresholds",
    "CheckpointsThresholds",
    "DecisionThresholds",
    "DetectionThresholds",
    "DiagnosisThresholds",
    "DistributedThresholds",
    "MeasurementThresholds",
    "RateSearchThresholds",
    "RecordsThresholds",
    "SamplesThresholds",
    "SnapshotsThresholds",
    "Thresholds",
    "TrialThresholds",
]


@dataclass(frozen=True)
class Thresholds:
    """All thresholds of one guard.

    Attributes:
        detection: When a reading counts as a fault.
        decision: When the batch, the learner or the state is blamed for a fault, and what follows.
        trial: How a trial is made, and what it has to show before a finite suspicion is acted on.
        rate_search: How a learning rate is tried, cut and given back.
        snapshots: When snapshots are taken, certified and distrusted.
        batches: How many batches are kept, and when one is strange.
        checkpoints: What of a run is saved and rewound, and how a bad checkpoint is described.
        measurement: Where one way to measure is cheaper than another.
        records: How much is recorded, shown and kept.
        distributed: How long ranks wait, and what they share.
        diagnosis: When a number is evidence for a cause.
        samples: When a single sample of a batch counts as bad, and how it is searched for.
    """

    detection: DetectionThresholds = field(default_factory=DetectionThresholds)
    decision: DecisionThresholds = field(default_factory=DecisionThresholds)
    trial: TrialThresholds = field(default_factory=TrialThresholds)
    rate_search: RateSearchThresholds = field(default_factory=RateSearchThresholds)
    snapshots: SnapshotsThresholds = field(default_factory=SnapshotsThresholds)
    batches: BatchesThresholds = field(default_factory=BatchesThresholds)
    checkpoints: CheckpointsThresholds = field(default_factory=CheckpointsThresholds)
    measurement: MeasurementThresholds = field(default_factory=MeasurementThresholds)
    records: RecordsThresholds = field(default_factory=RecordsThresholds)
    distributed: DistributedThresholds = field(default_factory=DistributedThresholds)
    diagnosis: DiagnosisThresholds = field(default_factory=DiagnosisThresholds)
    samples: SamplesThresholds = field(default_factory=SamplesThresholds)
