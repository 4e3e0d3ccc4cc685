"""Detects mistakes in what every step is made of: its batch, its loss, its gradient and its learning rate."""

from __future__ import annotations

from lightning_nanguard.diagnosis.mistakes.observation import Observation
from lightning_nanguard.thresholds.diagnosis import DiagnosisThresholds
from lightning_nanguard.types import Finding


def data_repeats(seen: Observation, thresholds: DiagnosisThresholds) -> Finding | None:
    """Many batches of one epoch are the same."""
    limits = thresholds.mistakes
    if seen.batches < limits.batches or seen.batches - seen.distinct < limits.repeated * seen.batches:
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


def learning_rate_zero(seen: Observation, thresholds: DiagnosisThresholds) -> Finding | None:
    """All groups of an optimizer had a rate of zero in every update, and nothing else changes their parameters.

    Single groups of zero are intended.
    """
    for index in dict.fromkeys(one.optimizer for one in seen.rates):
        rates = [one for one in seen.rates if one.optimizer == index]
        if all(one.highest == 0.0 and not one.moved for one in rates):
            why = "Look at the scheduler" if seen.scheduled else "Look at configure_optimizers"
            what = (
                f"the learning rate of optimizer {index} was zero in each of the first {seen.updates} updates: "
                f"nothing was learned. {why}."
            )
            return seen.finding("learning_rate_zero", thresholds.confidence.mistake, f"optimizer {index}", what, lr=0.0)
    return None


def schedule_ended(seen: Observation, thresholds: DiagnosisThresholds) -> Finding | None:
    """All rates have fallen almost to zero, and most of the run is still to come.

    A schedule that ends with the run, or that rises again, is intended. Whether it rises again, only later updates
    show (:class:`~lightning_nanguard.trainer.run_advice.EndedSchedule`).
    """
    limits = thresholds.mistakes
    if not seen.scheduled or seen.expected < limits.runs_on * seen.updates:
        return None
    alive = [one for one in seen.rates if one.highest > 0.0]
    if not alive or any(one.rose or one.last > limits.ended * one.highest or one.last < 0.0 for one in alive):
        return None
    most = max(alive, key=lambda one: one.last)
    left = "" if seen.expected == float("inf") else f" of about {seen.expected:,.0f}"
    return seen.finding(
        "schedule_ended",
        thresholds.confidence.mistake,
        place=f"optimizer {most.optimizer}",
        highest_lr=most.highest,
        lr=most.last,
        suggestion=(
            f"the schedule lowered the learning rate from {most.highest:.3g} to {most.last:.3g} within the first "
            f"{seen.updates} updates{left}, and it has not raised it again in the {seen.since} updates after them. At "
            "this rate almost nothing is learned. Check what the schedule counts, updates (interval='step') or epochs, "
            "and how long it is."
        ),
    )
