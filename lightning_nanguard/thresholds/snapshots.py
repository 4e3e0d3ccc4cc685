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
    """How many updates lie between snapshots, where the user sets no number.

    Attributes:
        first: Updates before the first measured snapshot, and the shortest interval: a shorter one could not be timed.
        longest: Updates of the longest interval: a restore must not lose more.
        time_share: Share of the run's time that snapshots may take.
        early_factor: How many times as often as measured snapshots come early in a run, where a long interval would
            lose most of what was learned. The additional ones take a twentieth of the first interval's time at most.
        most_growth: How many times as long an interval may be as the one before: what the first snapshot took, with
            memory to allocate, must not keep the second one away for a thousand updates.
        announced_after: Measured snapshots after which the interval is logged: the third measurement stands.
    """

    first: int = 16
    longest: int = 1 << 14
    time_share: float = 0.01
    early_factor: int = 8
    most_growth: int = 8
    announced_after: int = 3


@dataclass(frozen=True)
class PlacementThresholds:
    """Where snapshots lie.

    Attributes:
        memory_reserve: Share of a device's memory that is left free: batches differ in size, and the allocator's blocks
            do not fit exactly.
        negligible_share: Share of a device's memory below which a snapshot is put there without knowing the peak.
        host_reserve: Share of the host's free memory that is left free: loaders and other programs grow.
        looked_every: Updates after which the room on a device is looked at again: a longer sequence or a first
            validation raises the peak, and snapshots may be thousands of updates apart. A look takes less than 1 ms.
        staging_bytes: Bytes of the device through which copies beside the run go. Each piece of that size costs about
            twenty launches.
        largest_block: Bytes of the largest block of pinned memory that several tensors share.
        least_block: Bytes of the smallest block that is to be full.
        host_alignment: Bytes at whose multiples a tensor begins in a block: vectorised copies need it.
    """

    memory_reserve: float = 0.05
    negligible_share: float = 0.05
    host_reserve: float = 0.1
    looked_every: int = 64
    staging_bytes: int = 64 << 20
    largest_block: int = 4 << 30
    least_block: int = 1 << 20
    host_alignment: int = 64


@dataclass(frozen=True)
class RingThresholds:
    """Which snapshots are kept.

    Attributes:
        certify_after: Healthy readings after a snapshot before it is certified; damage may show one update late.
        about_best: Share of the loss unit within which two loss levels count as equal.
        certify_anyway: Healthy readings after which a snapshot is certified although a detector is uneasy about it.
        keep_start: Healthy updates for which the oldest snapshot is kept; a rate that ruins the model shows by then.
    """

    certify_after: int = 2
    about_best: float = 0.1
    certify_anyway: int = 100
    keep_start: int = 1000


@dataclass(frozen=True)
class MomentThresholds:
    """When a first moment is out of the bound that its second moment gives.

    Attributes:
        slack: Factor on the bound, for what rounding adds up to in 32 bits: less than a thousandth.
        underflows: How many times the smallest normal number a second moment may lose in one step, where the square of
            a gradient underflows. Over many steps this adds up to it divided by 1 − β₂.
        least_decay: Smallest 1 − β₂ for which rounding is small beside it.
        most_elements: Elements of all first moments that may be out of bounds where something flipped them; where it is
            more at once, somebody rewrote moments.
        piece: Elements compared at a time; more would take room on the device.
    """

    slack: float = 1.1
    underflows: float = 4.0
    least_decay: float = 1e-5
    most_elements: int = 8
    piece: int = 1 << 24


@dataclass(frozen=True)
class PlausibilityThresholds:
    """When a finite tensor is far out of range, compared with the newest certified snapshot.

    Attributes:
        settled_after: Healthy updates after which statistics and moments no longer come from their initial values.
        weight_growth: Factor by which a parameter's largest element grew. An optimizer moves a weight by its rate, so
            weights grow by less than second moments, which go with the square of a gradient.
        certain_weight_growth: The same factor where nothing is tried, so that growth alone decides.
        state_growth: The same factor for statistics and moments.
        early_growth: The same factor for all of them before ``settled_after``. For moments that were 0 or are new it is
            the factor on the largest gradient norm, or on its square where that is larger.
        least_magnitude: Magnitude up to which growth does not count: below it any number may be a usual one.
        times_gradient: Multiple of the largest element of the newest gradient up to which a moment is in proportion to
            it, whatever it was before; of its square for second moments. Momentum of 0.99 sums up to 100 gradients.
        trials: How often one tensor that is found again and again is still tried on the newest batches.
        moments: When a first moment is out of its bound.
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
        interval: How many updates lie between snapshots.
        placement: Where snapshots lie.
        ring: Which snapshots are kept.
        plausibility: When a finite tensor is far out of range.
    """

    interval: IntervalThresholds = field(default_factory=IntervalThresholds)
    placement: PlacementThresholds = field(default_factory=PlacementThresholds)
    ring: RingThresholds = field(default_factory=RingThresholds)
    plausibility: PlausibilityThresholds = field(default_factory=PlausibilityThresholds)
