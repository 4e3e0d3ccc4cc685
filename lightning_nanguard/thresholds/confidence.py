"""How sure each diagnosis rule is of its finding."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Confidences:
    """Confidence of each rule in its finding, from 0 to 1; the finding with the highest confidence is reported.

    Only their order decides which cause is named where several rules find one.

    Attributes:
        told: Up to this a finding is a guess; advice on a cause is given during a run only above it.
        suspicion: A finite loss or gradient looks bad, and no evidence was looked for. That is told all the same.
        non_finite_input: NaN or Inf in the batch.
        non_finite_input_tolerated: The same, where the loss is finite or an operation explains it.
        target_operation: An operation on the target alone left its domain.
        no_valid_target: No target of the batch counts, or a mask of it selects nothing.
        target_class: A class index that the loss has no score for.
        labels_unrelated: Neighbours in the inputs share their label no more often than by chance.
        outliers: Samples far larger than the others, in the input or in the target.
        unnormalised_harm: Large inputs, and the untrained model or the course of the run suffers.
        unnormalised: Large inputs alone.
        operation: A logarithm, exponential or division that was given what it is not defined for.
        unknown_operation: The operation that made the first non-finite value is known, and no rule fits it.
        random_draw: The fault is gone with other random numbers.
        non_finite_from_start: No loss was ever finite, and a buffer is not.
        unbounded_loss: Targets for which the loss has no lower bound.
        sqrt_at_zero: A finite loss whose derivative is infinite at a root.
        low_precision_proven: The same batch is finite in float32.
        low_precision_float16: A float16 number overflowed, and float32 was not tried.
        low_precision_loss_scale: The loss scale collapsed, and float32 was not tried.
        state_non_finite: A tensor of the learner is not finite.
        state_element: An element of a weight moved out of all proportion to its neighbours.
        state_jump: A weight is far larger than any was in the snapshot.
        transient: A fault was gone when its step, or the updates since a snapshot, were made again.
        update_again: State is not finite whenever an update is made again from the good state.
        update_before: The same was found of this tensor before.
        state_implausible: A buffer is far larger than it was.
        gradient_product: A product overflowed in the backward pass.
        gradient_large: A finite gradient far above the usual.
        gradient_initial: The gradient of an untrained model grows toward the input.
        rate_trial: A trial of a lower rate, or the growth of the weights or the loss, blames the learner.
        rate_diverged: The learner diverged by any other sign.
        rate_worse: Nothing but the comparison with the last good weights speaks for it.
        rate_above_limit: The rate is above what the curvature allows, besides.
        ill_conditioned: One direction is far steeper than the others, and the rate looks low.
        collapsed: A trial shows that the run has lost what it had learned.
        saturated_most: Most outputs of a bounded activation lie at its ends.
        saturated_half: More than half of them do.
        saturated_some: Some of them do.
        dead_all: Nearly all units of a rectifier are dead.
        dead_most: Most of them are.
        dead_some: Many of them are.
        vanishing_proven: The gradient nearly vanishes, or the first layers stand still.
        vanishing: The gradient falls far toward the input.
        vanishing_blocked: The same, where saturated or dead units explain it.
        unbalanced_proven: One layer enlarges what goes through it, and the first loss shows it.
        unbalanced: One of the two, clearly.
        unbalanced_guess: One of the two, where something else may explain it.
        mse_many_classes: A squared loss on more than two classes.
        mse_two_classes: A squared loss on two classes.
        double_softmax: Probabilities given to a loss that applies its own softmax.
        wrong_custom_gradient: A custom function's gradient differs from finite differences.
        wrong_gradient: A parameter's gradient does, which may be meant.
        oscillation: Successive gradients are opposed at a high loss, above their noise.
        oscillation_guess: The same at a low loss or within the noise.
        saddle_point: No gradient, and a negative eigenvalue.
        local_minimum: No gradient, and no negative eigenvalue; the data may hold nothing more to learn.
        layer_update_diverged: One layer's updates are far larger, and the learner is at fault.
        layer_update_stuck: The same, and the loss does not move.
        layer_update_guess: The same alone.
        batch_size: The noise of the gradient is larger than the gradient, measured over enough batches.
        batch_size_guess: The same over too few batches.
        mistake: The first updates show a mistake that makes no NaN.
        mistake_guess: The same, where it may be meant.
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
    rate_worse: float = 0.6
    rate_above_limit: float = 0.91
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
