"""Detects mistakes in what every step is made of: its batch, its loss and its gradient."""

from __future__ import annotations

from lightning_nanguard.diagnosis.mistakes.observation import Observation
from lightning_nanguard.thresholds.diagnosis import DiagnosisThresholds
from lightning_nanguard.types import Finding


def data_repeats(seen: Observation, thresholds: DiagnosisThresholds) -> Finding | None:
    """Many batches of one epoch are the same."""
    limits = thresholds.mistakes
    if seen.batches < limits.least_batches or seen.batches - seen.distinct < limits.repeated * seen.batches:
        return None
    return Finding(
        "data_repeats",
        thresholds.confidence.mistake,
        evidence={"batches": float(seen.batches), "distinct": float(seen.distinct)},
        place="the training data",
        suggestion=(
            f"only {seen.distinct} of the first {seen.batches} batches of an epoch differ. Check the data set's "
            "__getitem__ (does it use its index?), the sampler, and whether each worker of an iterable data set "
            "reads its own part."
        ),
    )


def loss_without_graph(seen: Observation, thresholds: DiagnosisThresholds) -> Finding | None:
    """Every loss is a new tensor without a graph, or no parameter ever got a gradient from it.

    If parameters change all the same, they are trained in another way, for example within the backward pass.
    """
    nobody = seen.parameters and not any(one.gradient for one in seen.parameters)
    learns = any(one.trainable and one.moved for one in seen.parameters)
    if not seen.losses or learns or not (seen.graphless == seen.losses or nobody):
        return None
    return seen.finding(
        "loss_without_graph",
        thresholds.confidence.mistake,
        place="loss",
        losses=seen.losses,
        suggestion=(
            f"no parameter got a gradient in the first {seen.updates} updates: the loss does not depend on any trained "
            "parameter. Look for torch.tensor(loss), item(), detach() or numpy() between the model and the loss that "
            "training_step returns."
        ),
    )


def gradient_not_zeroed(seen: Observation, thresholds: DiagnosisThresholds) -> Finding | None:
    """Every gradient is added to the gradient of the update before."""
    if seen.added < thresholds.mistakes.added:
        return None
    return Finding(
        "gradient_not_zeroed",
        thresholds.confidence.mistake,
        evidence={"updates": float(seen.added)},
        place="gradient",
        suggestion=(
            f"in {seen.added} updates in a row the gradient was added to that of the update before. "
            "Call optimizer.zero_grad() before each backward pass that begins an update."
        ),
        scope="learner",  # the updates become too large at any rate
    )
