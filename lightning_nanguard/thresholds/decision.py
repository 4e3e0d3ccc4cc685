"""When the batch, the learner or the state is blamed for a fault, and what follows."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["BlameThresholds", "DecisionThresholds", "EvidenceThresholds", "RecoveryThresholds"]


@dataclass(frozen=True)
class BlameThresholds:
    """When the learner is blamed for a fault, rather than its batch or bad state.

    Attributes:
        calm: Updates accepted after a restore, after which the learner is trusted again.
        calm_when_late: The same for a fault whose update was made before its reading arrived, so that the weights are
            no evidence.
        beginning: Updates accepted since the start, up to which the learner is blamed if nothing else is. After a
            restore that does not blame the learner, the readings of as many first updates are kept, so that detectors
            still know the usual values.
        patience: Faulty updates in a row before the learner is suspected.
        patience_with_chance: Faulty updates in a row that the data alone may cause: if four of five batches are bad,
            chance gives so many in a row once in a million runs. After so many the learner is suspected even if the
            weights do no worse on other batches. The run is stopped if no update was healthy yet.
        rate_risen: Ratio of two learning rates above which the larger one has clearly risen.
        sane_loss: Loss units above the first loss. If the loss of a batch under good weights is higher, the batch
            itself is at fault. In the beginning also the ratio of what the present weights add to this loss to what it
            is above the first one, below which the batch is at fault.
        worse_for_batch: Loss units by which the present weights must be worse than the good ones, so that the batch is
            not blamed.
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
        same_rate: Share of a rate that failed. Rates above it count as failed, too.
        proven_below: Share of a rate that failed. A proven rate above it no longer counts as proven.
        progress: Loss units by which the loss must have fallen before a rate counts as proven.
        proven_sooner: Number by which the wait is divided if the rate is raised to a proven one.
        wait_doubled: How often the wait is doubled before the rate reaches one that failed; once more each time this
            rate fails again.
    """

    same_rate: float = 0.75
    proven_below: float = 0.25
    progress: float = 0.2
    proven_sooner: int = 20
    wait_doubled: int = 2


@dataclass(frozen=True)
class EvidenceThresholds:
    """When a fault is investigated, and which differences are clear.

    Attributes:
        jump: Factor on the largest weight of the snapshot (at least 1). A weight above it is bad state, because no
            accepted update makes a weight so large.
        known_batches: Consecutive verdicts against the batch, after which most faults of that kind and place are not
            investigated.
        clearly_worse: Share of a loss (or of the loss unit, if smaller) by which another loss must exceed it to be
            clearly worse.
        nothing: Difference of losses that is ignored: in loss units or absolute, whichever is less.
    """

    jump: float = 1e4
    known_batches: int = 4
    clearly_worse: float = 0.3
    nothing: float = 0.01


@dataclass(frozen=True)
class DecisionThresholds:
    """Thresholds of the policy.

    Attributes:
        blame: When the learner is blamed.
        recovery: When a cut is given back.
        evidence: When a fault is investigated, and which differences are clear.
        depth_by_state: Recent restores, after which the next restore of bad state goes one snapshot deeper.
        same_restores: Rollbacks for the same fault at the same place, without a correction and without a snapshot
            certified in between. The run is stopped instead of a further one, because it would have the same result.
        corrected_restores: The same for rollbacks that each have a larger correction than the one before, and for those
            within the budget's window for a tensor that becomes bad each time an update is made again.
        careful: In deferred readback, number of updates that are read before they are made after one had to be undone.
            Faults come in groups, and each undone update costs what was learned since the snapshot. The number doubles
            each time.
        few_skips: Number of skips after which ``Budget(max_skip_share=…)`` applies. Of fewer skips, a share means
            little.
    """

    blame: BlameThresholds = field(default_factory=BlameThresholds)
    recovery: RecoveryThresholds = field(default_factory=RecoveryThresholds)
    evidence: EvidenceThresholds = field(default_factory=EvidenceThresholds)
    depth_by_state: int = 2
    same_restores: int = 2
    corrected_restores: int = 6
    careful: int = 1000
    few_skips: int = 32
