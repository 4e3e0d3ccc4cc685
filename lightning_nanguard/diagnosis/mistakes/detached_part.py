"""Detects parts whose output is detached from the autograd graph."""

from __future__ import annotations

from lightning_nanguard.diagnosis.mistakes.observation import Observation, named
from lightning_nanguard.thresholds.diagnosis import DiagnosisThresholds
from lightning_nanguard.types import Finding


def detached_part(seen: Observation, thresholds: DiagnosisThresholds) -> Finding | None:
    """Parts are in an optimizer and get no gradient, because their output is detached before it is used.

    For copies of other parts, and for weights of an earlier training, this is intended.
    """
    cut = seen.parts(
        lambda one: (
            one.trainable
            and one.optimized
            and not one.gradient
            and one.cut
            and not one.copy
            and one.untrained is not False
        )
    )
    if not cut:
        return None
    parts = named(cut, thresholds.mistakes.named_parts)
    return Finding(
        "detached_part",
        thresholds.confidence.mistake,
        evidence={"parts": float(len(cut)), "updates": float(seen.updates)},
        place=parts,
        suggestion=(
            f"{parts} are in the optimizer but got no gradient in the first {seen.updates} updates: their outputs "
            "are detached from the graph before other parts use them. Look for detach(), .data, item(), numpy() or "
            "torch.tensor(…) after them. If this is intended, leave them out of the optimizer."
        ),
    )
