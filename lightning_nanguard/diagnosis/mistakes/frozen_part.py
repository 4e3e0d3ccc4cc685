"""Detects parts that are frozen although they were never trained."""

from __future__ import annotations

from lightning_nanguard.diagnosis.mistakes.observation import Observation, named
from lightning_nanguard.thresholds.diagnosis import DiagnosisThresholds
from lightning_nanguard.types import Finding


def frozen_part(seen: Observation, thresholds: DiagnosisThresholds) -> Finding | None:
    """Parts require no gradient and look untrained.

    These frozen parts are intended: one with weights of an earlier training, one in an optimizer (it will be unfrozen),
    a copy of another part, and one in which other layers are trained (adapters).
    """
    if seen.unfreezes:
        return None
    trained = [one.name for one in seen.parameters if one.trained]
    frozen = seen.parts(
        lambda one: (
            not one.trainable
            and not one.optimized
            and one.ran
            and not one.copy
            and one.moved is not True
            and bool(one.untrained)
        )
    )
    frozen = tuple(part for part in frozen if not _among(part, trained))
    if not frozen or not trained:
        return None
    parts = named(frozen, thresholds.mistakes.named_parts)
    return Finding(
        "frozen_part",
        thresholds.confidence.mistake_guess,
        evidence={"parts": float(len(frozen)), "updates": float(seen.updates)},
        place=parts,
        suggestion=(
            f"{parts} are frozen (requires_grad is False), and their weights look as they were initialised. Load the "
            "trained weights before you freeze them, or do not freeze them. If random features are intended, ignore "
            "this."
        ),
    )


def _among(part: str, trained: list[str]) -> bool:
    """Whether other parameters of the same part of the model are trained."""
    around = part.rpartition(".")[0]
    return bool(around) and any(name.startswith(f"{around}.") for name in trained)
