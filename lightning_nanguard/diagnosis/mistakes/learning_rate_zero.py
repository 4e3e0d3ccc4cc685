"""Detects a learning rate of zero."""

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
            return Finding(
                "learning_rate_zero",
                thresholds.confidence.mistake,
                evidence={"lr": 0.0, "updates": float(seen.updates)},
                place=f"optimizer {index}",
                suggestion=(
                    f"the learning rate of optimizer {index} was zero in each of the first {seen.updates} updates: "
                    f"nothing was learned. {why}."
                ),
            )
    return None
