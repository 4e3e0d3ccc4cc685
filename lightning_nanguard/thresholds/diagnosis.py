"""When a number is evidence for a cause, and how much a diagnosis may cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_nanguard.thresholds.confidence import Confidences
from lightning_nanguard.thresholds.decision import BlameThresholds
from lightning_nanguard.thresholds.mistakes import LabelThresholds, MistakeThresholds


@dataclass(frozen=True)
class DataThresholds:
    """When the numbers of a batch are unusual.

    Attributes:
        outlier_factor: Factor on the usual largest magnitude of a sample. A sample that reaches it is an outlier.
        other_units: Factor on the largest number of the same field in the healthy batches before. A batch with a larger
            number may be in other units.
        outlier_min_samples: Fewest samples in a batch with which there is a usual magnitude.
        unnormalised_rms: Root mean square at which an input counts as not normalised. Pixels of 0 to 255 have about
            150.
        trusted_steps: Healthy updates after which inputs that are not normalised are taken for harmless.
        near_zero: Magnitude below which a denominator counts as zero.
    """

    outlier_factor: float = 1e3
    other_units: float = 100.0
    outlier_min_samples: int = 3
    unnormalised_rms: float = 10.0
    trusted_steps: int = 20
    near_zero: float = 1e-3


@dataclass(frozen=True)
class LayerThresholds:
    """What is measured of each layer.

    Attributes:
        max_layers: Layers of one model that are measured; later ones are left out.
        min_samples: Fewest samples with which a unit that is never positive counts as dead, and fewest numbers of a
            target with which its mean square is known. Fewer may all be zero by chance.
        end_share: Share of the range of a bounded activation, at each end, in which an output counts as saturated.
        min_binary_targets: Fewest zeros and ones in a target with which they count as two classes.
    """

    max_layers: int = 2048
    min_samples: int = 8
    end_share: float = 0.01
    min_binary_targets: int = 4


@dataclass(frozen=True)
class ModelThresholds:
    """When the model or its loss function is at fault.

    Attributes:
        saturated_some: Share of saturated outputs of a bounded activation at which it is named.
        saturated_half: Share above which saturation is likely the cause, and blocks the gradient.
        saturated_most: Share above which saturation is almost certainly the cause.
        dead_some: Share of dead units of a ReLU at which it is named.
        dead_most: Share above which dead units are likely the cause.
        dead_all: Share above which dead units are almost certainly the cause.
        min_layers: Fewest layers with a gradient with which the gradient is compared from layer to layer.
        neighbour_factor: Factor on the gradient of the next layer. If the gradient of a layer is at most this large, it
            counts as smaller than that of the next one.
        falling_share: Share of neighbouring layers between which the gradient has to become smaller.
        vanished: Gradient of the first third of the layers divided by that of the last third, at which it counts as
            vanished.
        vanished_while_still: The same, if the first third is known not to change.
        vanished_surely: Ratio below which the gradient has certainly vanished.
        still_update: Norm of an update divided by that of the weight, below which the weight counts as not changing.
        small_activation: Root mean square below which the finding also names the activations.
        exploded: Gradient of the first third divided by that of the last, at which it counts as exploding.
        max_gain: Factor by which a layer may enlarge its inputs. Wide layers whose weights have a standard deviation of
            1 exceed it.
        huge_activation: Root mean square that an untrained model rarely reaches on normalised inputs.
        scales_apart: Ratio of the outputs of the largest layer to those of the smallest layer of an untrained model, at
            which the model is unbalanced.
        steep_above_chance: Factor on the loss at chance level. A first loss above it comes from a layer that enlarges
            its inputs, if there is one.
        cross_entropy_above_chance: Factor on the loss at chance level. A first loss above it comes from outputs that
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
        grown_told: Growth above which the finding names it.
        ruined: Growth above which the model is ruined, so that the operation that overflowed in the end is not the
            cause.
        untrained_units: Loss units above the untrained model's loss. If the loss is higher, the model is ruined.
        spike_factor: Factor on the usual gradient norm. If the batch gives at least this norm when it is run again, it
            is the cause of a spike.
        clip_factor: Factor on the usual gradient norm that gives the suggested clipping value.
        suggested_cut: Number by which a suggestion divides the learning rate if the curvature is not known.
        rate_far_above: Factor on the rate that the curvature allows. A rate above it is to blame for any fault; good
            runs stay near the allowed rate.
        uneven_curvature: Factor on the usual curvature. If the curvature in the steepest direction reaches it, the loss
            is ill-conditioned.
        lowered_in_vain: Factor by which the guard has lowered the rate since the same fault, at which the rate is not
            the cause if no weight grew.
        usual_sgd: A usual learning rate and weight decay of SGD (those of ResNets on ImageNet, to a factor of five). If
            the two together make weights grow, the one that is farther above is at fault.
        usual_adamw: The same for AdamW (the defaults of ``torch.optim.AdamW``).
    """

    worse_units: float = 0.1
    grown: float = 4.0
    grown_told: float = 2.0
    ruined: float = 12.0
    untrained_units: float = 0.1
    spike_factor: float = 10.0
    clip_factor: float = 2.0
    suggested_cut: float = 10.0
    rate_far_above: float = 4.0
    uneven_curvature: float = 100.0
    lowered_in_vain: float = 100.0
    usual_sgd: tuple[float, float] = (0.1, 5e-4)
    usual_adamw: tuple[float, float] = (1e-3, 1e-2)


@dataclass(frozen=True)
class PlateauThresholds:
    """When a loss counts as not moving, and why it does not move.

    Attributes:
        moved: Share of the untrained model's loss by which a loss has to fall to count as moving.
        fallen: Share of its own level by which a loss has to fall to count as falling.
        risen: Share of the untrained model's loss by which a loss has to rise to count as rising.
        spreads: Multiple of the usual change of the level that each of these has to exceed, too.
        learned: Share of the untrained model's loss. If less than this share is gone, the loss is high.
        near_chance: Share of the loss at chance level above which the loss is high.
        opposed: Cosine of the gradients of a batch before and after an update, below which they have opposite
            directions.
        oscillation_noise: Noise of the gradient divided by its norm, up to which opposite gradients are more than
            noise.
        no_gradient: The gradient counts as zero if the best step along it would lower the loss by less than this share.
        negative: Share of the largest eigenvalue. If an eigenvalue is below minus this share, the loss falls in its
            direction.
        not_negative: Share of the largest eigenvalue. A negative eigenvalue up to this share counts as zero. Between
            the two shares it may be noise of the samples.
        rounding: Magnitude of an eigenvalue below which it is a rounding error.
        large_update: Norm of a layer's update divided by that of its weights, at which the update is abnormal.
        updates_apart: Factor on the relative update of the other layers that an abnormal update also reaches.
        noisy: Noise of the gradient divided by its norm, at which a batch is too small.
        small_batch: Largest number of samples of a small batch.
        min_samples: Samples that the compared updates of small batches must have together before the loss counts as not
            moving.
        min_batches: Fewest batches on which the noise is measured. At a minimum the gradient of a healthy run is only
            noise, too.
        standard_errors: Standard errors by which the mean gradient has to exceed this noise.
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
        moved_factor: Factor on the usual movement of the other elements.
        outside_factor: Factor on the largest magnitude of the tensor before. If other elements exceed it, too, an
            update moved them and this element.
        usual_quantile: Quantile of the movements of all elements that moved. It is the usual movement.
    """

    moved_factor: float = 1e3
    outside_factor: float = 10.0
    usual_quantile: float = 0.99


@dataclass(frozen=True)
class ReplayThresholds:
    """How often a faulty update is run again, and how much of it.

    Attributes:
        max_micro_batches: Micro-batches of one update that are run again, the newest ones.
        always: Number of faults of one kind at one place that are all run again. After them only the 4th, 8th, 16th …
            is.
        other_draws: How often a batch is run again with other random numbers, to find out whether its fault depends on
            them.
        findings: Newest findings of a run that later faults are compared with.
        fading: Factor on the confidence of an earlier finding if it is used for a later fault that was not run again.
    """

    max_micro_batches: int = 8
    always: int = 3
    other_draws: int = 3
    findings: int = 32
    fading: float = 0.5


@dataclass(frozen=True)
class PreflightThresholds:
    """How much of the data is examined before the first step.

    Attributes:
        max_samples: Samples that are read one by one, spread over the data set.
        max_bytes: Largest size of a data set of tensors that is examined as a whole.
        outlier_factor: Factor on the usual magnitude at which a sample of the data set is named. Heavy tails reach
            thousands.
    """

    max_samples: int = 128
    max_bytes: int = 2**30
    outlier_factor: float = 1e6


@dataclass(frozen=True)
class ExaminationThresholds:
    """When a run is examined, and over how many batches.

    Attributes:
        levels: Number of loss levels within ``examine_after`` updates.
        first_losses: Updates before the first level.
        level_losses: Newest losses whose median is a level.
        min_batches: Batches whose gradients are compared, however much memory this takes.
        max_elements: Largest number of elements in all gradients that are compared, if there are more batches.
    """

    levels: int = 8
    first_losses: int = 8
    level_losses: int = 32
    min_batches: int = 8
    max_elements: int = 2**23


@dataclass(frozen=True)
class CurvatureThresholds:
    """How curvature is computed.

    Attributes:
        difference: Relative size of a finite difference. It balances rounding in float32 against curvature of higher
            order.
        low_rate: Largest rate of plain gradient descent that looks low. If a run diverges at such a rate, the loss may
            be ill-conditioned.
        power_iterations: Products with the Hessian that are used to find the steepest direction.
        tolerance: Relative accuracy of the extreme eigenvalues.
        restarts: Restarts of Lanczos' method for each extreme eigenvalue. Each takes about twenty products.
        dense_size: Number of parameters up to which the whole Hessian is computed, because they are too few for
            Lanczos' method.
    """

    difference: float = 5e-3
    low_rate: float = 0.01
    power_iterations: int = 2
    tolerance: float = 1e-2
    restarts: int = 5
    dense_size: int = 24


@dataclass(frozen=True)
class BundleThresholds:
    """How many incidents of one run are kept.

    Attributes:
        max_bundles: Incidents of all kinds.
        max_per_kind: Incidents of one fault and cause.
    """

    max_bundles: int = 10
    max_per_kind: int = 3


@dataclass(frozen=True)
class DiagnosisThresholds:
    """When a number is evidence for a cause.

    Attributes:
        confidence: Confidence of each finding.
        data: When the numbers of a batch are unusual.
        layers: What is measured of each layer.
        model: When the model or its loss function is at fault.
        learner: When the learner is to blame for a fault.
        plateau: When a loss counts as not moving, and why it does not move.
        state: When an element of a weight moved in a way that no update explains.
        replay: How often a faulty update is run again, and how much of it.
        preflight: How much of the data is examined before the first step.
        examination: When a run is examined, and over how many batches.
        curvature: How curvature is computed.
        bundles: How many incidents of one run are kept.
        mistakes: When the first updates show a mistake without NaN.
        labels: How the guard tests whether labels depend on their inputs.
        blame: When the guard blames the learner. In a fit these are ``Thresholds.decision.blame``.
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
    bundles: BundleThresholds = field(default_factory=BundleThresholds)
    mistakes: MistakeThresholds = field(default_factory=MistakeThresholds)
    labels: LabelThresholds = field(default_factory=LabelThresholds)
    blame: BlameThresholds = field(default_factory=BlameThresholds)


DEFAULT = DiagnosisThresholds()
"""The thresholds that the parts of the diagnosis use by default."""
