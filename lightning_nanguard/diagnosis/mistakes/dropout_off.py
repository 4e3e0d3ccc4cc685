"""Detects dropout layers in evaluation mode inside a model in training mode."""

from __future__ import annotations

from lightning_nanguard.diagnosis.mistakes.observation import Observation, named
from lightning_nanguard.thresholds.diagnosis import DiagnosisThresholds
from lightning_nanguard.types import Finding


def dropout_off(seen: Observation, thresholds: DiagnosisThresholds) -> Finding | None:
    """Dropout layers with a rate above zero are in evaluation mode, and the modules around them are not."""
    if seen.evaluating or not any(one.trained for one in seen.parameters):
        return None
    off = [one for one in seen.modes if one.drops and not one.training and one.within == one.path]
    if not off:
        return None
    layers = named([one.path for one in off], thresholds.mistakes.named_parts)
    return Finding(
        "dropout_off",
        thresholds.confidence.mistake,
        evidence={"modules": float(len(off)), "updates": float(seen.updates)},
        place=layers,
        suggestion=(
            f"{layers} ({off[0].kind}) stayed in evaluation mode up to update {seen.updates}, while the model around "
            "was in training mode. Call train() on the module, or set p to 0 if you want no dropout."
        ),
    )
