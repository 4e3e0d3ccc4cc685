"""When snapshots are taken, certified and distrusted."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = [
    "IntervalThresholds",
    "MomentThresholds",
    "PlacementThresholds",
    "PlausibilityThresholds",
    "RingThresholds",
    "SnapshotsThresholds",
]


@dataclass(frozen=True)
class IntervalThresholds:
    """How many updates are between snapshots, if the user sets no number.

    Attributes:
        first: Updates before the first measured snapshot, and the shortest interval. A shorter one could not be
            measured.
        longest: Updates of the longest interval, so that a rollback does not lose more.
        time_share: Share of the run's time that snapshots may take.
        early_factor: How many times as often snapshots come early in a run, when a long interval would lose most of
            what was learned. The additional ones take at most a twentieth of the time of the first interval.
        most_growth: Largest ratio of an interval to the one before. The first snapshot takes longer, because it
            allocates memory; this must not delay the second one by a thousand updates.
        announced_after: Measured snapshots after which the interval is logged.
    """

    first: int = 16
    longest: int = 1 << 14
    time_share: float = 0.01
    early_factor: int = 8
    most_growth: int = 8
    announced_after: int = 3


@dataclass(frozen=True)
class PlacementThresholds:
    """Where snapshots are kept.

    Attributes:
        memory_reserve: Share of a device's memory that stays free. Batches differ in size, and blocks of the allocator
            do not fit exactly. A snapshot smaller than this is put on the device before the peak of the memory is
            known.
        host_reserve: Share of the host's free memory that stays free, because loaders and other programs need more.
        looked_every: Updates after which the free memory of a device is measured again. A longer sequence or a first
            validation needs more, and snapshots may be thousands of updates apart. It takes less than 1 ms.
        staging_bytes: Bytes on the device through which copies in the background go. Each piece of this size costs
            about twenty kernel launches.
    """

    memory_reserve: float = 0.05
    host_reserve: float = 0.1
    looked_every: int = 64
    staging_bytes: int = 64 << 20


@dataclass(frozen=True)
class RingThresholds:
    """Which snapshots are kept.

    Attributes:
        certify_after: Healthy readings after a snapshot before it is certified. Damage may show one update late.
        about_best: Share of the loss unit up to which two loss levels count as equal.
        certify_anyway: Healthy readings after which a snapshot is certified although a detector suspects the state
            (``Detector.uneasy``).
        keep_start: Healthy updates for which the oldest snapshot is kept. A rate that ruins the model shows by then.
    """

    certify_after: int = 2
    about_best: float = 0.1
    certify_anyway: int = 100
    keep_start: int = 1000


@dataclass(frozen=True)
class MomentThresholds:
    """When a first moment is larger than its second moment allows.

    Attributes:
        slack: Factor on the bound, to allow for rounding in 32 bits, which is less than a thousandth.
        underflows: Multiple of the smallest normal number that a second moment may lose in one step, if the square of a
            gradient underflows. Over many steps the loss adds up to this divided by 1 − β₂.
        least_decay: Smallest 1 − β₂ with which rounding is small in comparison.
        most_elements: Elements of all first moments that may exceed the bound at once to count as a fault. If there are
            more, code has rewritten the moments.
    """

    slack: float = 1.1
    underflows: float = 4.0
    least_decay: float = 1e-5
    most_elements: int = 8


@dataclass(frozen=True)
class PlausibilityThresholds:
    """When a finite tensor is far out of range, compared with the newest certified snapshot.

    Attributes:
        settled_after: Healthy updates after which statistics and moments no longer come from their initial values.
        weight_growth: Factor by which the largest element of a parameter grew. Weights grow by less than second
            moments, because an optimizer moves a weight by its rate, and second moments depend on the square of the
            gradient.
        certain_weight_growth: The same factor if growth alone decides, without comparing losses.
        state_growth: The same factor for statistics and moments.
        early_growth: The same factor for all of them before ``settled_after``. For moments that were 0 or are new, it
            is the factor on the largest gradient norm, or on its square if that is larger.
        least_magnitude: Magnitude up to which growth does not count, because any number below it may be usual.
        times_gradient: Multiple of the largest element of the newest gradient (for second moments: of its square) up to
            which a moment is in proportion. Momentum of 0.99 adds up to 100 gradients.
        trials: How often the loss is compared for a tensor that exceeds the limit again and again.
        moments: When a first moment is larger than its second moment allows.
    """

    settled_after: int = 100
    weight_growth: float = 1e3
    certain_weight_growth: float = 1e6
    state_growth: float = 1e4
    early_growth: float = 1e12
    least_magnitude: float = 1.0
    times_gradient: float = 100.0
    trials: int = 3
    moments: MomentThresholds = field(default_factory=MomentThresholds)


@dataclass(frozen=True)
class SnapshotsThresholds:
    """When snapshots are taken, certified and distrusted.

    Attributes:
        interval: How many updates are between snapshots.
        placement: Where snapshots are kept.
        ring: Which snapshots are kept.
        plausibility: When a finite tensor is far out of range.
    """

    interval: IntervalThresholds = field(default_factory=IntervalThresholds)
    placement: PlacementThresholds = field(default_factory=PlacementThresholds)
    ring: RingThresholds = field(default_factory=RingThresholds)
    plausibility: PlausibilityThresholds = field(default_factory=PlausibilityThresholds)
