"""Detects a learning rate of zero, or so close to zero that no number format holds the update."""

from __future__ import annotations

from lightning_nanguard.diagnosis.mistakes.observation import Observation
from lightning_nanguard.thresholds.diagnosis import DiagnosisThresholds
from lightning_nanguard.types import Finding

_LEAST = 2.0**-126
"""The smallest normal 32-bit number."""


def learning_rate_zero(seen: Observation, thresholds: DiagnosisThresholds) -> Finding | None:
    """All groups of an optimizer had a rate of about zero in every update. Single groups of zero are intended."""
    for index in dict.fromkeys(one.optimizer for one in seen.rates):
        rates = [one for one in seen.rates if one.optimizer == index]
        if all(one.highest < _LEAST for one in rates):
            why = "Look at the scheduler" if seen.scheduled else "Look at configure_optimizers"
            return Finding(
                "learning_rate_zero",
                thresholds.confidence.mistake,
                evidence={"lr": max(one.highest for one in rates), "updates": float(seen.updates)},
                place=f"optimizer {index}",
                suggestion=(
                    f"the learning rate of optimizer {index} was zero in each of the first {seen.updates} updates: "
                    f"nothing was learned. {why}."
                ),
            )
    return None
