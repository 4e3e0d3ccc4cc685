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
        scale_growth: Factor by which the scale of a GradScaler cannot grow in one update, because a GradScaler only
            doubles it. If a scale that the user has raised overflows, the guard may restore the one before.
    """

    max_norm: float = 1e18
    scale_growth: float = 16.0


@dataclass(frozen=True)
class SpikeThresholds:
    """When a finite gradient norm counts as a spike, in addition to the arguments of ``GradientSpike``.

    Attributes:
        above_largest: Factor on the largest norm in the window that a spike has to exceed; heavy tails reach a few
            times this norm.
        above_first: Factor on the largest of the first norms that a spike has to exceed. If the data change after the
            loss has fallen, the norm may be as large as for the untrained model.
        extreme: Factor on the largest norm accepted in the whole run. A norm above it is extreme.
        min_deviation: Least deviation of the logarithm of the norm. Without it every small change of norms that hardly
            vary would be a spike.
        warmup_above_largest: During warm-up, factor on the largest norm so far that a spike has to exceed.
        warmup_doubtful: During warm-up, factor on the largest norm so far above which a norm is a spike if its batch is
            strange, too.
    """

    above_largest: float = 10.0
    above_first: float = 2.0
    extreme: float = 1e4
    min_deviation: float = 0.1
    warmup_above_largest: float = 1e6
    warmup_doubtful: float = 100.0


@dataclass(frozen=True)
class DivergingLossThresholds:
    """When a finite loss is suspected, in addition to the arguments of ``DivergingLoss``.

    Attributes:
        readings: Newest losses of which all but one have to be above a level. By chance, less than one run in a
            thousand without a trend has so many above its median.
        level_readings: Newest losses whose median is the loss level. The best level is the lowest so far.
        lost: Share of what was learned from which on a loss is far above the best level. It is the share that a trial
            requires (:class:`~lightning_nanguard.thresholds.TrialThresholds`).
        learned: A loss that is hardly above the first one is told only if the run had learned this many times what the
            middle half of the newest losses spans. Of a constant with noise, the lowest loss level is about one such
            range below the first loss.
    """

    readings: int = 16
    level_readings: int = 8
    lost: float = 0.3
    learned: float = 4.0


@dataclass(frozen=True)
class UsualNormThresholds:
    """Which gradient norm is usual.

    Attributes:
        min_norms: Fewest norms from which a usual one is computed.
        quantile_norms: Number of norms from which a quantile is computed. Of fewer norms the lowest one is used.
        quantile_part: The quantile is 1 divided by this number. It is low, because in a diverging run the median rises
            long before a norm counts as a fault.
        min_share_of_first: Share of the first norm that the usual norm has at least. A model with saturated units has
            almost no gradient.
    """

    min_norms: int = 4
    quantile_norms: int = 20
    quantile_part: int = 4
    min_share_of_first: float = 0.01


@dataclass(frozen=True)
class ClimbThresholds:
    """When the newest losses or norms are above their usual range.

    Attributes:
        newest: Number of the newest of these that have to be above the range of the others. The one before them does
            not count, because it may be part of the climb.
        min_others: Fewest others. With fewer, the usual range is not known.
        noise: Deviations of the others by which the newest have to exceed their median.
        loss: Loss units by which losses have to exceed it at least.
        norm: Factor on the median that gradient norms have to exceed at least.
    """

    newest: int = 2
    min_others: int = 3
    noise: float = 4.0
    loss: float = 0.5
    norm: float = 5.0


@dataclass(frozen=True)
class BurstThresholds:
    """When a gradient norm counts as a burst: suddenly far above those before it.

    Attributes:
        times: Factor on the largest of the norms before it that a burst has to exceed. If a learning rate is too high,
            norms rise more slowly.
        before: Number of norms before it that are compared.
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
        recent: Newest readings that show a trend: the noise of the loss, a climb, or whether the newer half of the
            losses is below the older half.
        min_noise_losses: Fewest losses from which the noise is computed.
        level_losses: Newest losses whose mean, without the highest, is the loss level.
        learning: A run learns if its loss is below the first one by this share of what was learned.
        learning_noise: Deviations of the noise by which it also has to be below the first one, because that is a single
            loss.
        falling: Standard errors by which the newer half has to be below the older half to be falling.
        usual_norm: Which gradient norm is usual.
        climb: When losses or norms climb.
        burst: When a norm counts as a burst.
    """

    readings: int = 128
    recent: int = 32
    min_noise_losses: int = 8
    level_losses: int = 8
    learning: float = 0.1
    learning_noise: float = 3.0
    falling: float = 2.0
    usual_norm: UsualNormThresholds = field(default_factory=UsualNormThresholds)
    climb: ClimbThresholds = field(default_factory=ClimbThresholds)
    burst: BurstThresholds = field(default_factory=BurstThresholds)


@dataclass(frozen=True)
class OutlierThresholds:
    """When a loss, a gradient norm or a learning rate of one update is far from those around it.

    In 52 healthy runs of the benchmarks (15,429 updates, heavy tails included) no loss or norm is that far. The largest
    norm is 4 times those around it.

    Attributes:
        before: Most losses and norms before an outlier that it is compared with.
        least: Fewest of them.
        after: Losses and norms after it that it is compared with. A learning rate is compared with as many before and
            after it, because before the first update there are none.
        norm: Factor on the largest of the other norms.
        loss: Ranges of the other losses by which an outlier is below them. It also has to be farther from them than all
            that the run has learned. Above them there is no outlier, because the tails of losses are heavy there.
        rate: Factor on the largest of the other learning rates, and divisor of the smallest.
        steady: Factor by which the other rates differ less where one below them is an outlier. A warm-up begins with
            rates that are far below those after it.
        average: Factor on the largest norm of the weights in any snapshot. An average of weights has no larger norm
            than the largest of them, and between two snapshots the norm changes by less.
    """

    before: int = 16
    least: int = 4
    after: int = 3
    norm: float = 20.0
    loss: float = 2.0
    rate: float = 10.0
    steady: float = 2.0
    average: float = 1.5


@dataclass(frozen=True)
class DetectionThresholds:
    """When a reading counts as a fault.

    Attributes:
        non_finite: For the detector ``NonFinite``.
        gradient_spike: For the detector ``GradientSpike``.
        diverging_loss: For the detector ``DivergingLoss``.
        history: For the history of each optimizer's readings.
        outlier: When the advice about an outlier is given.
    """

    non_finite: NonFiniteThresholds = field(default_factory=NonFiniteThresholds)
    gradient_spike: SpikeThresholds = field(default_factory=SpikeThresholds)
    diverging_loss: DivergingLossThresholds = field(default_factory=DivergingLossThresholds)
    history: HistoryThresholds = field(default_factory=HistoryThresholds)
    outlier: OutlierThresholds = field(default_factory=OutlierThresholds)
