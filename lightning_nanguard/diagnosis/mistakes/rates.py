"""Detects learning rates with which nothing is learned."""

from __future__ import annotations

from lightning_nanguard.diagnosis.mistakes.observation import Observation
from lightning_nanguard.thresholds.diagnosis import DiagnosisThresholds
from lightning_nanguard.types import Finding


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
