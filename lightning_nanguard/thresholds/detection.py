"""When a reading counts as a fault.

The dataclasses are neither final nor slotted: jsonargparse cannot take nested ones from YAML otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class NonFiniteThresholds:
    """When a finite gradient counts as an overflow.

    Attributes:
        max_norm: Largest gradient norm. Adam squares the gradient in float32: beyond this norm a second moment becomes
            Inf and stays so.
    """

    max_norm: float = 1e18


@dataclass(frozen=True)
class SpikeThresholds:
    """When a finite gradient norm counts as a spike, beside the arguments of ``GradientSpike``.

    Attributes:
        above_largest: Times the largest norm in the window that a spike has to exceed; heavy tails reach a few times.
        above_first: Times the largest norm of the beginning that a spike has to exceed: when the data change after the
            loss has come down, the norm may be as large as it was for the untrained model.
        extreme: Times the largest norm accepted in the whole run that puts a norm out of all proportion.
        min_deviation: Least deviation of the logarithm of the norm, so that norms which hardly vary do not make every
            small change a spike.
        warmup_above_largest: During warm-up, times the largest norm so far that a spike has to exceed.
        warmup_min_norm: During warm-up, least norm of a spike; smaller ones are usual at the beginning of a run.
        warmup_doubtful: During warm-up, times the largest norm so far from which a norm is a spike if its batch is out
            of the ordinary, too.
        warmup_min_norms: Accepted norms from which a norm can be doubtful.
    """

    above_largest: float = 10.0
    above_first: float = 2.0
    extreme: float = 1e4
    min_deviation: float = 0.1
    warmup_above_largest: float = 1e5
    warmup_min_norm: float = 1e6
    warmup_doubtful: float = 100.0
    warmup_min_norms: int = 2


@dataclass(frozen=True)
class ExplodingThresholds:
    """When a loss far above the untrained model's counts as exploding. What counts as far is ``DivergingLoss(factor)``.

    Attributes:
        readings: Newest losses whose median has to be far above; the newer half is compared with the older one.
        keeps: Share of the older half's median that the newer half's has to exceed; a lower one is coming back.
        abrupt_readings: Newest losses that are enough where all of them are very far above.
        abrupt_factor: Times ``factor`` that counts as very far above.
        abrupt_keeps: Share of the oldest of these losses that the newest has to reach; a lower one is coming back.
    """

    readings: int = 8
    keeps: float = 0.7
    abrupt_readings: int = 3
    abrupt_factor: float = 100.0
    abrupt_keeps: float = 0.5


@dataclass(frozen=True)
class CollapsedThresholds:
    """When a loss that had fallen counts as being back at the untrained level.

    Attributes:
        readings: Newest losses that all have to lie near the untrained level or above it.
        near_untrained: Share of what was learned by which they may lie below the untrained level.
        keeps: Share of the distance to the best level, in the older half of them, that the newer half has to keep.
        settled_share: Share of what was learned that a loss at rest has to have lost.
        settled_noise: Deviations by which a loss at rest has to lie above the best level.
        noise_readings: Losses from which their deviation is taken for noise; that of fewer is too uncertain.
        max_learned: Loss units that a run may have learned. A loss that fell by more has no floor near 0 (a policy
            gradient's), and is no measure of progress before it is back at the untrained level altogether.
    """

    readings: int = 12
    near_untrained: float = 0.1
    keeps: float = 0.7
    settled_share: float = 0.6
    settled_noise: float = 4.0
    noise_readings: int = 8
    max_learned: float = 3.0


@dataclass(frozen=True)
class UnsteadyThresholds:
    """When a loss that had fallen counts as swinging.

    Attributes:
        above: Loss units that the trimmed mean has to lie above the untrained level.
        trimmed_part: One in so many losses, the highest ones, is left out of the mean, so that an outlier does not
            decide.
    """

    above: float = 1.0
    trimmed_part: int = 10


@dataclass(frozen=True)
class StuckThresholds:
    """When a loss counts as one that never got below the untrained model's.

    Attributes:
        min_updates: Updates since the start or the last rollback before it can.
        max_updates: Updates after which it no longer can: a model that has not learned by then has a hard task; ruin
            by a learning rate shows earlier.
        every: The loss is checked once in this many updates; a loss that does not move can wait.
        readings: Newest losses that are looked at.
        min_readings: Fewest losses that are judged.
        above: Loss units above the untrained level that all of them have to exceed to be a fault at once.
        at_rest: Loss units below the untrained level down to which a loss at rest counts: an untrained model's loss may
            lie above that of chance, where a ruined one comes to rest.
    """

    min_updates: int = 12
    max_updates: int = 1000
    every: int = 4
    readings: int = 16
    min_readings: int = 12
    above: float = 0.5
    at_rest: float = 0.7


@dataclass(frozen=True)
class OvershootThresholds:
    """When a rise of the loss makes the guard look at the weights.

    Attributes:
        above: Loss units above the untrained level from which a loss counts as a rise.
        after: Readings after a rise at which the weights are looked at; by then they show whether they have grown.
        longest_pause: Most readings for which a harmless rise silences others. It is short because to look at a rise
            takes some norms and no batch.
    """

    above: float = 2.0
    after: int = 12
    longest_pause: int = 400


@dataclass(frozen=True)
class DismissalThresholds:
    """For how long a suspicion is silenced after a false alarm of the same kind.

    Attributes:
        first_pause: Number of readings of the first pause.
        growth: Ratio of each pause to the one before.
        longest_pause: Number of readings of the longest pause.
        far_higher: Times the dismissed loss above which a suspicion is raised during a pause all the same.
    """

    first_pause: int = 25
    growth: int = 4
    longest_pause: int = 3200
    far_higher: float = 10.0


@dataclass(frozen=True)
class DivergingLossThresholds:
    """When a finite loss counts as diverging, beside the arguments of ``DivergingLoss``.

    The untrained model's loss, or untrained level, is the loss of the first healthy update. Its size is the loss unit,
    in which losses are compared.

    Attributes:
        learned: Loss units below the untrained level from which a loss is that of a run which has learned.
        window: Least number of losses that are kept.
        level_readings: Newest losses whose median is the loss level that the best one is picked from.
        recent_readings: Newest losses of which the lowest says how high a suspicious loss is: an outlier is no level.
        falling: Standard errors by which the newer half of some losses has to lie below the older one to be falling.
        uneasy_above: Loss units above the untrained level from which no state is certified.
        uneasy_lost: Share of what was learned; once more than this is lost again, no state is certified.
        exploding: The shape ``exploding_loss``.
        collapsed: The shape ``collapsed``.
        unsteady: The shape ``unsteady_loss``.
        stuck: The shape ``stuck_loss``.
        overshoot: The shape ``overshoot``.
        dismissal: How long suspicions are silenced after false alarms.
    """

    learned: float = 0.3
    window: int = 64
    level_readings: int = 8
    recent_readings: int = 3
    falling: float = 0.5
    uneasy_above: float = 1.0
    uneasy_lost: float = 0.5
    exploding: ExplodingThresholds = field(default_factory=ExplodingThresholds)
    collapsed: CollapsedThresholds = field(default_factory=CollapsedThresholds)
    unsteady: UnsteadyThresholds = field(default_factory=UnsteadyThresholds)
    stuck: StuckThresholds = field(default_factory=StuckThresholds)
    overshoot: OvershootThresholds = field(default_factory=OvershootThresholds)
    dismissal: DismissalThresholds = field(default_factory=DismissalThresholds)


@dataclass(frozen=True)
class UsualNormThresholds:
    """Which gradient norm is usual.

    Attributes:
        min_norms: Fewest norms from which a usual one is taken.
        quantile_norms: Norms from which a quantile is taken; of fewer it is the least norm.
        quantile_part: The quantile is 1 divided by this. It is low, because in a diverging run the median rises long
            before a norm counts as a fault.
        min_share_of_first: Share of the first norm that it is at least: a model whose units are saturated has next to
            no gradient.
    """

    min_norms: int = 4
    quantile_norms: int = 20
    quantile_part: int = 4
    min_share_of_first: float = 0.01


@dataclass(frozen=True)
class ClimbThresholds:
    """When the newest losses or norms have left their usual range upwards.

    Attributes:
        readings: Newest readings that are looked at.
        newest: The newest of these have to lie above the range of the others.
        gap_readings: Readings from which the one before the newest is left out of the others: it may be part of the
            climb.
        noise: Deviations of the others by which the newest have to lie above their median.
        loss: Loss units by which they have to, at least.
        norm: Times the median by which gradient norms have to, at least.
    """

    readings: int = 32
    newest: int = 2
    gap_readings: int = 8
    noise: float = 4.0
    loss: float = 0.5
    norm: float = 5.0


@dataclass(frozen=True)
class BurstThresholds:
    """When a gradient norm counts as a burst: suddenly far above those before it.

    Attributes:
        times: Times the largest of the norms before it that it has to exceed; a rate that is too high lets norms climb
            more slowly.
        before: Norms before it that are looked at.
        min_before: Fewest norms before it with which it is compared.
    """

    times: float = 20.0
    before: int = 8
    min_before: int = 4


@dataclass(frozen=True)
class HistoryThresholds:
    """How many readings of an optimizer are kept, and when they show a trend.

    Attributes:
        readings: Readings that are kept.
        losses: Newest losses that are looked at where the number is not said.
        noise_losses: Newest losses whose deviation is the noise in the loss unit.
        min_noise_losses: Fewest losses from which noise is taken.
        level_losses: Newest losses whose mean, the highest left out, is the loss level.
        learning: Loss units below the untrained model's loss from which a level shows learning.
        falling_losses: Newest losses that are compared with as many before them.
        falling: Standard errors by which they have to lie below those to be falling.
        excursion: Loss units above the untrained model's loss from which a loss went far above it.
        far_off: Times the size of the untrained model's loss that a loss which is far off lies above it.
        usual_norm: Which gradient norm is usual.
        climb: When losses or norms climb.
        burst: When a norm counts as a burst.
    """

    readings: int = 128
    losses: int = 64
    noise_losses: int = 32
    min_noise_losses: int = 8
    level_losses: int = 8
    learning: float = 0.1
    falling_losses: int = 16
    falling: float = 2.0
    excursion: float = 1.0
    far_off: float = 1.0
    usual_norm: UsualNormThresholds = field(default_factory=UsualNormThresholds)
    climb: ClimbThresholds = field(default_factory=ClimbThresholds)
    burst: BurstThresholds = field(default_factory=BurstThresholds)


@dataclass(frozen=True)
class QuasiNewtonThresholds:
    """When the loss of an optimizer like LBFGS, which may rise far and recover by itself, counts as diverged.

    Attributes:
        comes_back: Updates in a row with a loss far above the first one from which it has diverged. The longest rise in
            240 healthy LBFGS runs took 46.
    """

    comes_back: int = 60


@dataclass(frozen=True)
class DetectionThresholds:
    """When a reading counts as a fault.

    Attributes:
        non_finite: For the detector ``NonFinite``.
        gradient_spike: For the detector ``GradientSpike``.
        diverging_loss: For the detector ``DivergingLoss``.
        history: For the history of each optimizer's readings.
        quasi_newton: For faults of LBFGS.
    """

    non_finite: NonFiniteThresholds = field(default_factory=NonFiniteThresholds)
    gradient_spike: SpikeThresholds = field(default_factory=SpikeThresholds)
    diverging_loss: DivergingLossThresholds = field(default_factory=DivergingLossThresholds)
    history: HistoryThresholds = field(default_factory=HistoryThresholds)
    quasi_newton: QuasiNewtonThresholds = field(default_factory=QuasiNewtonThresholds)
