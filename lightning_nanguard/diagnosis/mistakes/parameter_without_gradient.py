"""Detects parameters in an optimizer whose part runs with gradients switched off."""

from __future__ import annotations

from lightning_nanguard.diagnosis.mistakes.observation import Observation, named
from lightning_nanguard.thresholds.diagnosis import DiagnosisThresholds
from lightning_nanguard.types import Finding


def parameter_without_gradient(seen: Observation, thresholds: DiagnosisThresholds) -> Finding | None:
    """Parts run without gradients (``no_grad``), although they are in an optimizer and were never trained.

    This is intended for averages and target networks of other parts, for weights of an earlier training, and for parts
    that change in another way. Parts that do not run at all are no finding.
    """
    cut = seen.parts(
        lambda one: (
            one.trainable
            and one.optimized
            and not one.gradient
            and one.ran
            and not one.graph
            and not one.copy
            and bool(one.untrained)
            and one.moved is False
        )
    )
    if not cut or not any(one.gradient for one in seen.parameters):
        return None
    parts = named(cut, thresholds.mistakes.named_parts)
    return Finding(
        "parameter_without_gradient",
        thresholds.confidence.mistake,
        evidence={"parts": float(len(cut)), "updates": float(seen.updates)},
        place=parts,
        suggestion=(
            f"{parts} are in the optimizer but got no gradient in the first {seen.updates} updates: they are run with "
            "gradients switched off, and do not change. Run them outside torch.no_grad() (and "
            "inference_mode), or leave them out of the optimizer if they must not change."
        ),
    )
