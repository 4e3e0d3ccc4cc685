"""When the batch, the learner or the state is blamed for a fault, and what follows."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["BlameThresholds", "DecisionThresholds", "EvidenceThresholds", "LateReadingThresholds", "RecoveryThresholds"]


@dataclass(frozen=True)
class BlameThresholds:
    """When the learner is blamed for a fault, rather than its batch or bad state.

    Attributes:
        calm: Updates accepted after a restore from which on the learner is trusted again.
        calm_when_late: The same for a fault whose update was made before its reading arrived, so that its weights
            prove nothing.
        beginning: Updates accepted since the start up to which the learner is blamed where nothing else is.
        patience: Faulty updates in a row before the learner is suspected.
        patience_with_chance: Faulty updates in a row that the data alone may make: where four of five batches are bad
            by chance, so many come in a row once in a million runs. After so many the learner is suspected if the
            weights do no worse on other batches, and the run is stopped if no update was healthy yet.
        rate_risen: Ratio of two learning rates from which on the larger one has clearly risen.
        sane_loss: Loss units above the first loss; a batch whose loss is higher under good weights is itself at fault.
        worse_for_batch: Loss units by which the present weights must be worse than the good ones to clear the batch.
    """

    calm: int = 200
    calm_when_late: int = 20
    beginning: int = 20
    patience: int = 4
    patience_with_chance: int = 64
    rate_risen: float = 1.5
    sane_loss: float = 10.0
    worse_for_batch: float = 0.5


@dataclass(frozen=True)
class RecoveryThresholds:
    """When a learning rate that was cut is given back.

    Attributes:
        same_rate: Share of a rate that failed; a rate above it counts as failed, too.
        proven_below: Share of a rate that failed; a proven rate above it counts as proven no longer.
        progress: Loss units by which the loss must have fallen before a rate counts as proven.
        proven_sooner: Number by which the wait is divided where the rate goes up to a proven one.
        wait_doubled: How often the wait is doubled before the rate crosses one that failed; once more for each return
            that failed.
        most_doubled: How often it is doubled at most.
    """

    same_rate: float = 0.75
    proven_below: float = 0.25
    progress: float = 0.2
    proven_sooner: int = 20
    wait_doubled: int = 2
    most_doubled: int = 10


@dataclass(frozen=True)
class EvidenceThresholds:
    """What is looked into, and what counts as clear.

    Attributes:
        jump: Factor on the largest weight of the snapshot (at least 1) above which a weight is bad state: no accepted
            update makes one so large.
        known_batches: Consecutive verdicts against the batch after which most faults of that kind and place are not
            looked into.
        rate_risen: Ratio to the snapshot's learning rate from which on the rate has clearly risen.
        clearly_worse: Share of a loss (or of the loss unit, if smaller) by which another loss must exceed it to be
            clearly worse.
        nothing: Difference of losses that is ignored: in loss units and absolute, whichever is less.
    """

    jump: float = 1e4
    known_batches: int = 4
    rate_risen: float = 1.5
    clearly_worse: float = 0.3
    nothing: float = 0.01


@dataclass(frozen=True)
class LateReadingThresholds:
    """When updates are read before they are made although readings are deferred.

    Attributes:
        careful: Number of updates that are read in time after one was undone, because faults cluster and each undone
            update costs what was learned since the snapshot.
        most_doubled: How often that number is doubled, once for each further update undone.
        beginning: First updates of a run whose readings are kept through a restore that does not blame the learner, so
            that detectors still know what is usual.
    """

    careful: int = 1000
    most_doubled: int = 10
    beginning: int = 20


@dataclass(frozen=True)
class DecisionThresholds:
    """Thresholds of the policy.

    Attributes:
        blame: When the learner is blamed.
        recovery: When a cut is given back.
        evidence: What is examined, and what counts as clear.
        late: When updates are read in time although readings are deferred.
        same_level: Loss units within which two snapshots have the same level.
        depth_by_state: Recent restores after which the next restore of bad state goes one snapshot deeper.
        deepest: Most snapshots by which it goes deeper.
        same_restores: Rollbacks for the same fault at the same place, without any correction and without a snapshot
            certified in between, after which a further one would be the same action with the same result.
        corrected_restores: The same for rollbacks of which each comes with a larger correction than the one before.
        same_updates: Rollbacks within the budget's window for a tensor that comes out bad each time an update is made
            again, after which a further one would be of no use.
        few_skips: Skips from which on ``Budget(max_skip_share=…)`` is applied; of fewer, a share means nothing.
    """

    blame: BlameThresholds = field(default_factory=BlameThresholds)
    recovery: RecoveryThresholds = field(default_factory=RecoveryThresholds)
    evidence: EvidenceThresholds = field(default_factory=EvidenceThresholds)
    late: LateReadingThresholds = field(default_factory=LateReadingThresholds)
    same_level: float = 0.1
    depth_by_state: int = 2
    deepest: int = 8
    same_restores: int = 2
    corrected_restores: int = 6
    same_updates: int = 6
    few_skips: int = 32
