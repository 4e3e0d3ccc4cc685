"""The confidence of each diagnosis rule in its finding."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Confidences:
    """Confidence of each rule in its finding, from 0 to 1; the finding with the highest confidence is reported.

    Only their order decides which cause is named if several rules find one.

    Attributes:
        told: A finding with at most this confidence is a guess. During a run the guard gives advice on a cause only
            above it.
        suspicion: A finite loss or gradient looks bad, and no evidence was collected. The guard reports it
            nevertheless.
        non_finite_input: NaN or Inf in the batch.
        non_finite_input_tolerated: The same, if the loss is finite or an operation explains the fault.
        target_operation: An operation that depends only on the target got a number that it is not defined for.
        no_valid_target: No target of the batch counts, or a mask selects none.
        target_class: A class index that the loss has no score for.
        labels_unrelated: Neighbours in the inputs share their label no more often than by chance.
        outliers: Samples far larger than the others, in the input or in the target.
        unnormalised_harm: Inputs are large, and the untrained model or the run shows harm.
        unnormalised: Inputs are large, and nothing else is known.
        operation: A logarithm, exponential or division got a number that it is not defined for.
        unknown_operation: The operation that gave the first non-finite value is known, and no rule fits.
        changed_gradient: The operations of the step give a good gradient, and code after them a bad one. It is below
            that of an operation, which another rank may have found.
        unexplained: Nothing bad was found, and the batch was not run again.
        random_draw: The fault is gone with other random numbers.
        non_finite_from_start: No loss was ever finite, and a buffer is not.
        unbounded_loss: Targets for which the loss has no lower bound.
        sqrt_at_zero: A finite loss whose derivative is infinite at a root.
        low_precision_proven: The same batch is finite in float32.
        low_precision_float16: A float16 number overflowed, and float32 was not tried.
        low_precision_loss_scale: The loss scale collapsed, and float32 was not tried.
        state_non_finite: A tensor of the learner is not finite.
        state_element: An element of a weight moved much farther than the others.
        state_jump: A weight is far larger than any was in the snapshot.
        transient: A fault was gone when its step, or the updates since a snapshot, were made again.
        update_again: The state is not finite each time an update is made again from the good state.
        update_before: The same was found for this tensor before.
        state_implausible: A tensor is far larger than before.
        gradient_product: A product overflowed in the backward pass.
        gradient_large: A finite gradient is far above the usual norm.
        gradient_initial: The gradient of an untrained model grows toward the input.
        rate_trial: A trial of a lower rate, or the growth of the weights or the loss, blames the learner.
        rate_diverged: Other signs show that the learner diverged.
        rate_unseen: The guard blames the learner for a large gradient or large weights, and no batch can be run again.
            It is below that of samples that are far too large, so that the rate is not cut because of these.
        rate_worse: Only the comparison with the last good weights supports it.
        rate_above_limit: In addition, the rate is above the one that the curvature allows.
        unstable: The learner diverged, and a momentum or a weight decay alone makes it diverge.
        ill_conditioned: One direction is far steeper than the others, and the rate looks low.
        collapsed: A trial shows that the run has lost what it had learned.
        saturated_most: Most outputs of a bounded activation are at their lowest or highest value.
        saturated_half: More than half of them are.
        saturated_some: Some of them are.
        dead_all: Nearly all units of a ReLU are dead.
        dead_most: Most of them are.
        dead_some: Many of them are.
        vanishing_proven: The gradient nearly vanishes, or the first layers do not change.
        vanishing: The gradient becomes much smaller toward the input.
        vanishing_blocked: The same, if saturated or dead units explain it.
        unbalanced_proven: One layer enlarges its inputs too much, and the first loss shows it.
        unbalanced: One of the two, clearly.
        unbalanced_guess: One of the two, if something else may explain it.
        mse_many_classes: A squared loss on more than two classes.
        mse_two_classes: A squared loss on two classes.
        double_softmax: Probabilities given to a loss that applies its own softmax.
        wrong_custom_gradient: A custom function's gradient differs from finite differences.
        wrong_gradient: The gradient of a parameter differs, which may be intended.
        oscillation: Successive gradients have opposite directions at a high loss, by more than their noise.
        oscillation_guess: The same at a low loss or within the noise.
        saddle_point: The gradient is almost zero, and an eigenvalue is negative.
        local_minimum: The gradient is almost zero, and no eigenvalue is negative. There may be nothing more to learn.
        layer_update_diverged: One layer's updates are far larger, and the learner is at fault.
        layer_update_stuck: The same, and the loss does not move.
        layer_update_guess: The same, and nothing else is known.
        batch_size: The noise of the gradient is larger than the gradient, measured over enough batches.
        batch_size_guess: The same over too few batches.
        mistake: The first updates show a mistake that makes no NaN.
        mistake_guess: The same, if it may be intended.
    """

    told: float = 0.5
    suspicion: float = 0.5
    non_finite_input: float = 0.98
    non_finite_input_tolerated: float = 0.4
    target_operation: float = 0.95
    no_valid_target: float = 0.9
    target_class: float = 0.97
    labels_unrelated: float = 0.75
    outliers: float = 0.8
    unnormalised_harm: float = 0.94
    unnormalised: float = 0.5
    operation: float = 0.85
    unknown_operation: float = 0.3
    changed_gradient: float = 0.25
    unexplained: float = 0.1
    random_draw: float = 0.96
    non_finite_from_start: float = 0.92
    unbounded_loss: float = 0.85
    sqrt_at_zero: float = 0.9
    low_precision_proven: float = 0.95
    low_precision_float16: float = 0.7
    low_precision_loss_scale: float = 0.6
    state_non_finite: float = 0.97
    state_element: float = 0.95
    state_jump: float = 0.9
    transient: float = 0.9
    update_again: float = 0.99
    update_before: float = 0.975
    state_implausible: float = 0.7
    gradient_product: float = 0.75
    gradient_large: float = 0.7
    gradient_initial: float = 0.75
    rate_trial: float = 0.8
    rate_diverged: float = 0.9
    rate_unseen: float = 0.72
    rate_worse: float = 0.6
    rate_above_limit: float = 0.91
    unstable: float = 0.98
    ill_conditioned: float = 0.915
    collapsed: float = 0.8
    saturated_most: float = 0.85
    saturated_half: float = 0.7
    saturated_some: float = 0.4
    dead_all: float = 0.9
    dead_most: float = 0.75
    dead_some: float = 0.4
    vanishing_proven: float = 0.9
    vanishing: float = 0.75
    vanishing_blocked: float = 0.6
    unbalanced_proven: float = 0.93
    unbalanced: float = 0.7
    unbalanced_guess: float = 0.4
    mse_many_classes: float = 0.9
    mse_two_classes: float = 0.6
    double_softmax: float = 0.95
    wrong_custom_gradient: float = 0.9
    wrong_gradient: float = 0.6
    oscillation: float = 0.87
    oscillation_guess: float = 0.45
    saddle_point: float = 0.85
    local_minimum: float = 0.65
    layer_update_diverged: float = 0.93
    layer_update_stuck: float = 0.88
    layer_update_guess: float = 0.45
    batch_size: float = 0.7
    batch_size_guess: float = 0.4
    mistake: float = 0.85
    mistake_guess: float = 0.6
