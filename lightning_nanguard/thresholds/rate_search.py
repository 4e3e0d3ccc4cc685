"""How a learning rate is tried, cut and reviewed."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["CutThresholds", "RateSearchThresholds", "RehearsalThresholds", "ReviewThresholds"]


@dataclass(frozen=True)
class CutThresholds:
    """Which cut of the learning rate is taken.

    Attributes:
        largest_at_once: Largest cut that is planned at once.
        most_escalated: How often the planned cut is squared at most.
        largest_untried: Largest cut if no rate can be tried.
        grown_unproven: Growth of a weight matrix above which it alone determines the cut, if no rate can be tried.
        updates: Updates of each try, before their number is adapted to the optimizer.
        tries: Rates tried at most.
        ratio: Ratio of each rate tried to the one before. A review divides and multiplies by it, too.
        missing: Share of the best gain that a lower rate may lack.
        harm: Loss units above the loss before the try, above which a rate does harm.
        least_of_best: Smallest share of the best rate that is taken. Rates at the edge of stability look best for a few
            updates and fail later.
        most_of_best: Largest share of the best rate that is taken.
        nearly: Share of the gain of a cut that the present rate may lack, so that no cut is made.
    """

    largest_at_once: float = 0.1
    most_escalated: int = 10
    largest_untried: float = 1 / 1024
    grown_unproven: float = 25.0
    updates: int = 8
    tries: int = 10
    ratio: float = 0.25
    missing: float = 0.5
    harm: float = 0.1
    least_of_best: float = 1 / 16
    most_of_best: float = 1 / 2
    nearly: float = 0.02


@dataclass(frozen=True)
class RehearsalThresholds:
    """How a rate is tried on the newest batches.

    Attributes:
        momentum: Factor on the number of updates with momentum, which has its effect only after some updates.
        adaptive: Factor on the number of updates with an adaptive optimizer.
        diverged: A try ends if two losses in a row exceed the loss at its start by more than this multiple of that
            loss, or of the loss unit if it is larger. With clipping, one update may go too far and the loss may
            recover.
    """

    momentum: float = 2.0
    adaptive: float = 1.5
    diverged: float = 2.0


@dataclass(frozen=True)
class ReviewThresholds:
    """When and how a rate that was cut is reviewed.

    Attributes:
        first_after: Healthy updates from the change of the rate to the first review.
        wait_ratio: Factor on the number of healthy updates before each further review.
        clearly_more: Factor on the gain of the present rate that the larger rate must exceed.
        raised: Factor by which the rate is then raised, if it stays below the scheduled rate.
        forgotten: Share of all that was learned that learning some batches may cost on others. If it costs more, the
            rate is lowered.
        most_lowered: How often in a row the rate is lowered.
        tensor_rate_every: Healthy updates after which a rate that is a tensor is read, because the host waits for it.
    """

    first_after: int = 50
    wait_ratio: int = 4
    clearly_more: float = 2.0
    raised: float = 2.0
    forgotten: float = 0.1
    most_lowered: int = 3
    tensor_rate_every: int = 16


@dataclass(frozen=True)
class RateSearchThresholds:
    """Thresholds of cutting the learning rate.

    Attributes:
        cut: Which cut is taken.
        rehearsal: How a rate is tried.
        review: How a cut is reviewed.
    """

    cut: CutThresholds = field(default_factory=CutThresholds)
    rehearsal: RehearsalThresholds = field(default_factory=RehearsalThresholds)
    review: ReviewThresholds = field(default_factory=ReviewThresholds)
