"""Detects a learning-rate schedule that ends long before the run."""

from __future__ import annotations

from lightning_nanguard.diagnosis.mistakes.observation import Observation
from lightning_nanguard.thresholds.diagnosis import DiagnosisThresholds
from lightning_nanguard.types import Finding


def schedule_ended(seen: Observation, thresholds: DiagnosisThresholds) -> Finding | None:
    """All rates have fallen almost to zero, and most of the run is still to come.

    A schedule that ends with the run, or that rises again, is intended.
    """
    limits = thresholds.mistakes
    if not seen.scheduled or seen.expected < limits.runs_on * seen.updates:
        return None
    alive = [one for one in seen.rates if one.highest > 0.0]
    if not alive or any(one.rose or one.last > limits.ended * one.highest or one.last < 0.0 for one in alive):
        return None
    most = max(alive, key=lambda one: one.last)
    left = "" if seen.expected == float("inf") else f" of about {seen.expected:,.0f}"
    return Finding(
        "schedule_ended",
        thresholds.confidence.mistake,
        evidence={"highest_lr": most.highest, "lr": most.last, "updates": float(seen.updates)},
        place=f"optimizer {most.optimizer}",
        suggestion=(
            f"the schedule lowered the learning rate from {most.highest:.3g} to {most.last:.3g} within the first "
            f"{seen.updates} updates{left}: almost nothing is learned from now on. Check what the schedule "
            "counts, updates (interval='step') or epochs, and how long it is."
        ),
    )
