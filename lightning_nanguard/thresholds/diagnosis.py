"""When a number is evidence for a cause, and how much a diagnosis may cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_nanguard.thresholds.confidence import Confidences
from lightning_nanguard.thresholds.decision import BlameThresholds
from lightning_nanguard.thresholds.mistakes import LabelThresholds, MistakeThresholds


@dataclass(frozen=True)
class DataThresholds:
    """When the numbers of a batch are out of the ordinary.

    Attributes:
        outlier_factor: Factor on the usual largest magnitude of a sample, from which on a sample is an outlier.
        outlier_min_samples: Samples in a batch from which on there is a usual magnitude.
        unnormalised_rms: Root mean square of an input from which on it counts as not normalised; pixels of 0 to 255
            have about 150.
        trusted_steps: Healthy updates after which inputs that are not normalised have done no harm.
        near_zero: Magnitude below which a denominator is taken for zero.
    """

    outlier_factor: float = 1e3
    outlier_min_samples: int = 3
    unnormalised_rms: float = 10.0
    trusted_steps: int = 20
    near_zero: float = 1e-3


@dataclass(frozen=True)
class LayerThresholds:
    """What is measured of each layer.

    Attributes:
        max_layers: Layers of one model that are told apart; later ones are left out.
        min_samples: Samples from which on a unit that is never positive counts as dead, and target numbers from which
            on their mean square is known: fewer may all be zero by chance.
        end_share: Share of the range of a bounded activation that counts as one of its ends.
        min_binary_targets: Zeros and ones in a target from which on they are two classes, and no chance.
    """

    max_layers: int = 2048
    min_samples: int = 8
    end_share: float = 0.01
    min_binary_targets: int = 4


@dataclass(frozen=True)
class ModelThresholds:
    """When a model or its loss is at fault as it stands.

    Attributes:
        saturated_some: Share of outputs at the ends of a bounded activation, from which on it is named.
        saturated_half: Share above which it is likely the cause, and blocks the gradient.
        saturated_most: Share above which it is surely the cause.
        dead_some: Share of dead units of a rectifier, from which on it is named.
        dead_most: Share above which it is likely the cause.
        dead_all: Share above which it is surely the cause.
        min_layers: Layers with a gradient, from which on the gradient can be followed through them.
        neighbour_factor: Factor on the gradient of its later neighbour that an earlier layer's may have, and still
            fall.
        falling_share: Share of the neighbours between which the gradient has to fall.
        vanished: Gradient of the first third of the layers over that of the last, up to which it has vanished.
        vanished_while_still: The same, where the first third is known to stand still.
        vanished_surely: Below this ratio it has surely vanished.
        still_update: Share of a weight that an update makes, below which the weight stands still.
        small_activation: Root mean square below which activations are named along with it.
        exploded: Gradient of the first third over that of the last, from which on it has exploded.
        max_gain: Factor by which a layer may enlarge what goes through it; wide layers with weights of standard
            deviation 1 exceed it.
        huge_activation: Root mean square that an untrained model rarely reaches on normalised inputs.
        scales_apart: Between the largest and the smallest layer of an untrained model, from which on it is unbalanced.
        steep_above_chance: Factor on the loss at chance level, above which a layer that enlarges what goes through it
            is the reason; other untrained models begin at that level.
        cross_entropy_above_chance: Factor on the loss at chance level, above which a first loss comes from outputs that
            are far too large.
        mse_above_chance: The same for a squared loss.
        gradient_error: Relative difference from finite differences above which a gradient is wrong.
    """

    saturated_some: float = 0.3
    saturated_half: float = 0.5
    saturated_most: float = 0.7
    dead_some: float = 0.6
    dead_most: float = 0.8
    dead_all: float = 0.95
    min_layers: int = 3
    neighbour_factor: float = 2.0
    falling_share: float = 0.7
    vanished: float = 1e-4
    vanished_while_still: float = 1e-2
    vanished_surely: float = 1e-6
    still_update: float = 1e-6
    small_activation: float = 1e-6
    exploded: float = 1e4
    max_gain: float = 5.0
    huge_activation: float = 100.0
    scales_apart: float = 1e4
    steep_above_chance: float = 1.5
    cross_entropy_above_chance: float = 3.0
    mse_above_chance: float = 30.0
    gradient_error: float = 0.02


@dataclass(frozen=True)
class LearnerThresholds:
    """When the learner is to blame for a fault.

    Attributes:
        worse_units: Loss units by which a batch has to be worse under the present weights than under the good ones.
        grown: Growth of a weight matrix above which the learner diverged.
        grown_told: Growth above which it is named.
        ruined: Growth above which the model is ruined, so that the operation that overflowed in the end is not the
            cause.
        bad_loss_units: Loss units above the untrained model's loss, from which on the batch is bad under good weights,
            too.
        untrained_units: Loss units above the untrained model's loss, from which on the model is ruined.
        spike_factor: Factor on the usual gradient norm that the batch has to give again, to be the cause of a spike.
        clip_factor: Factor on the usual gradient norm that is suggested to clip at.
        suggested_cut: What a learning rate is divided by in a suggestion, where the curvature is not known.
        rate_far_above: Factor on the rate that the curvature allows, above which the rate is to blame for whatever
            follows; good runs stay about that rate.
        uneven_curvature: Factor on the usual curvature that the steepest direction has where a loss is ill-conditioned.
        rate_likely: Confidence in the rate from which on a rate above its limit makes it surer; below, a single steep
            batch may be above it, too.
    """

    worse_units: float = 0.1
    grown: float = 4.0
    grown_told: float = 2.0
    ruined: float = 12.0
    bad_loss_units: float = 10.0
    untrained_units: float = 0.1
    spike_factor: float = 10.0
    clip_factor: float = 2.0
    suggested_cut: float = 10.0
    rate_far_above: float = 4.0
    uneven_curvature: float = 100.0
    rate_likely: float = 0.7


@dataclass(frozen=True)
class PlateauThresholds:
    """When a loss counts as not moving, and what keeps it there.

    Attributes:
        moved: Share of the untrained model's loss by which a loss has to fall to have moved.
        fallen: Share of its own level by which a loss has to fall to have fallen, be that little of the first loss.
        risen: Share of the untrained model's loss by which a loss has to rise to have left its level upwards.
        spreads: Times its usual movement between the parts of the stretch that any of these has to exceed.
        learned: Share of the untrained model's loss that has to be gone, or else the loss is high.
        near_chance: Share of the loss at chance level above which the loss is high.
        opposed: Cosine of a batch's gradients before and after an update, below which they point back and forth.
        oscillation_noise: Noise of the gradient over its norm, up to which an opposed gradient is more than noise.
        no_gradient: What the best step along the gradient would gain, relative to the loss, below which the gradient
            counts as zero.
        negative: Share of the largest eigenvalue from which on a negative one is a way down.
        not_negative: Share of it up to which a negative one is none; between the two it may be the samples' noise.
        rounding: Magnitude of an eigenvalue below which all is rounding.
        large_update: Share of its weights that a layer's update makes, from which on it is abnormal.
        updates_apart: Factor on the update of the other layers, from which on it is abnormal.
        noisy: Noise of the gradient over its norm, from which on a batch is too small.
        small_batch: Samples up to which a batch is small.
        min_samples: Samples that a stretch of small batches has to hold before its losses say that it does not move.
        min_batches: Batches over which the noise is measured before it is sure: at a minimum the gradient of a healthy
            run is noise alone, too.
        standard_errors: By how many the mean gradient has to stand out of that noise.
        max_batch_size: Largest batch size that is suggested.
    """

    moved: float = 0.05
    fallen: float = 0.02
    risen: float = 0.25
    spreads: float = 2.0
    learned: float = 0.4
    near_chance: float = 0.95
    opposed: float = -0.3
    oscillation_noise: float = 1.0
    no_gradient: float = 0.02
    negative: float = 0.1
    not_negative: float = 0.01
    rounding: float = 1e-7
    large_update: float = 0.05
    updates_apart: float = 100.0
    noisy: float = 2.0
    small_batch: int = 4
    min_samples: int = 256
    min_batches: int = 32
    standard_errors: float = 4.0
    max_batch_size: int = 1024


@dataclass(frozen=True)
class StateChangeThresholds:
    """When an element of a weight moved in a way that no update explains.

    Attributes:
        moved_factor: Factor on the usual movement of its neighbours.
        outside_factor: Factor on the largest magnitude of its tensor before; neighbours that left it as well were
            thrown there by an update, and the element with them.
        usual_quantile: Share of the elements that moved, whose largest movement is the usual one.
    """

    moved_factor: float = 1e3
    outside_factor: float = 10.0
    usual_quantile: float = 0.99


@dataclass(frozen=True)
class ReplayThresholds:
    """How often and how much of a faulty update is run again.

    Attributes:
        max_micro_batches: Micro-batches of one update that are run again, the newest.
        always: How often a fault of one kind and place is run again each time; then at 4, 8, 16, … of them.
        other_draws: How often a batch is run again with other random numbers, to see whether its fault depends on them.
        recent_operations: Newest operations before an exception, among whose inputs the value is looked for that it is
            about.
        findings: Newest findings of a run that later faults are compared with.
        fading: Factor by which an earlier finding is less sure of a later fault that was not run again.
    """

    max_micro_batches: int = 8
    always: int = 3
    other_draws: int = 3
    recent_operations: int = 32
    findings: int = 32
    fading: float = 0.5


@dataclass(frozen=True)
class PreflightThresholds:
    """How much of the data is looked at before the first step.

    Attributes:
        max_samples: Samples that are fetched one by one, spread over the data set.
        max_bytes: Largest size of a data set of tensors that is looked at as a whole.
        outlier_factor: Factor on the usual magnitude from which on a sample of the data set is named; heavy tails reach
            thousands.
    """

    max_samples: int = 128
    max_bytes: int = 2**30
    outlier_factor: float = 1e6


@dataclass(frozen=True)
class ExaminationThresholds:
    """When a run is examined, and over how many batches.

    Attributes:
        levels: Loss levels that one stretch of patience is divided into.
        first_losses: Updates before the first level.
        level_losses: Newest losses whose median is a level.
        min_batches: Batches whose gradients are compared, whatever that takes.
        max_elements: Numbers that the gradients of more batches may hold.
        max_updates: Newest updates whose batches are run again, as far as they are kept.
    """

    levels: int = 8
    first_losses: int = 8
    level_losses: int = 32
    min_batches: int = 8
    max_elements: int = 2**23
    max_updates: int = 256


@dataclass(frozen=True)
class CurvatureThresholds:
    """How curvature is computed.

    Attributes:
        difference: Relative size of a finite difference: balances rounding in float32 against curvature of higher
            order.
        low_rate: Rate of plain gradient descent up to which nobody would call it high, and a loss that diverges may be
            ill-conditioned.
        power_iterations: Products that the steepest direction is found with.
        probes: Random directions that the usual curvature is the mean of.
        tolerance: Relative accuracy of the ends of the spectrum.
        restarts: Restarts of Lanczos' method for each end; each takes some twenty products.
        dense_size: Parameters up to which the whole Hessian is computed: too few for Lanczos' method.
    """

    difference: float = 5e-3
    low_rate: float = 0.01
    power_iterations: int = 2
    probes: int = 1
    tolerance: float = 1e-2
    restarts: int = 5
    dense_size: int = 24


@dataclass(frozen=True)
class GradientCheckThresholds:
    """How gradients are compared with finite differences.

    Attributes:
        max_parameters: Parameters that are checked; each takes two forward passes for each direction.
        directions: Random directions that are compared; a wrong gradient may be right along one of them.
        difference: Size of the first finite difference, in double precision.
        differences: Sizes that are tried, each a tenth of the one before: a kink between the two points makes a
            difference that another size lacks.
        close: Relative difference below which no further size is tried.
        rounding: Relative difference of two losses that rounding alone may make.
        gradcheck_tolerance: Absolute tolerance of ``torch.autograd.gradcheck``.
        gradcheck_nondeterminism: Difference between two backward passes that it tolerates.
        gradcheck_error: Relative difference that stands for a custom function which it refuses.
    """

    max_parameters: int = 200
    directions: int = 2
    difference: float = 1e-5
    differences: int = 3
    close: float = 0.01
    rounding: float = 1e-13
    gradcheck_tolerance: float = 1e-4
    gradcheck_nondeterminism: float = 1e-9
    gradcheck_error: float = 0.1


@dataclass(frozen=True)
class BundleThresholds:
    """How many incidents of one run are kept.

    Attributes:
        max_bundles: Of all kinds.
        max_per_kind: Of one fault and cause.
    """

    max_bundles: int = 10
    max_per_kind: int = 3


@dataclass(frozen=True)
class DiagnosisThresholds:
    """When a number is evidence for a cause.

    Attributes:
        confidence: How sure each finding is.
        data: When the numbers of a batch are out of the ordinary.
        layers: What is measured of each layer.
        model: When a model or its loss is at fault as it stands.
        learner: When the learner is to blame for a fault.
        plateau: When a loss counts as not moving, and what keeps it there.
        state: When an element of a weight moved in a way that no update explains.
        replay: How often and how much of a faulty update is run again.
        preflight: How much of the data is looked at before the first step.
        examination: When a run is examined, and over how many batches.
        curvature: How curvature is computed.
        gradients: How gradients are compared with finite differences.
        bundles: How many incidents of one run are kept.
        mistakes: When the first updates show a mistake that makes no NaN.
        labels: How it is told whether labels have anything to do with their inputs.
        blame: When the guard blames the learner; in a fit ``Thresholds.decision.blame`` stands here.
    """

    confidence: Confidences = field(default_factory=Confidences)
    data: DataThresholds = field(default_factory=DataThresholds)
    layers: LayerThresholds = field(default_factory=LayerThresholds)
    model: ModelThresholds = field(default_factory=ModelThresholds)
    learner: LearnerThresholds = field(default_factory=LearnerThresholds)
    plateau: PlateauThresholds = field(default_factory=PlateauThresholds)
    state: StateChangeThresholds = field(default_factory=StateChangeThresholds)
    replay: ReplayThresholds = field(default_factory=ReplayThresholds)
    preflight: PreflightThresholds = field(default_factory=PreflightThresholds)
    examination: ExaminationThresholds = field(default_factory=ExaminationThresholds)
    curvature: CurvatureThresholds = field(default_factory=CurvatureThresholds)
    gradients: GradientCheckThresholds = field(default_factory=GradientCheckThresholds)
    bundles: BundleThresholds = field(default_factory=BundleThresholds)
    mistakes: MistakeThresholds = field(default_factory=MistakeThresholds)
    labels: LabelThresholds = field(default_factory=LabelThresholds)
    blame: BlameThresholds = field(default_factory=BlameThresholds)


DEFAULT = DiagnosisThresholds()
"""What every part of the diagnosis uses unless it is given others."""
