"""Detects gradients that are not set to zero between updates."""

from __future__ import annotations

from lightning_nanguard.diagnosis.mistakes.observation import Observation
from lightning_nanguard.thresholds.diagnosis import DiagnosisThresholds
from lightning_nanguard.types import Finding


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
    )
