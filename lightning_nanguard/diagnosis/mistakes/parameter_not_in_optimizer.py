"""Detects parameters that get a gradient and are in no optimizer."""

from __future__ import annotations

from lightning_nanguard.diagnosis.mistakes.observation import Observation, named
from lightning_nanguard.thresholds.diagnosis import DiagnosisThresholds
from lightning_nanguard.types import Finding


def parameter_not_in_optimizer(seen: Observation, thresholds: DiagnosisThresholds) -> Finding | None:
    """Parts get a gradient in each update and are in no optimizer, so they are never trained.

    A part without a gradient is intended not to learn. A part with weights of an earlier training is no finding either:
    only later layers are trained. A part that changes is trained in another way, such as a copy in half precision.
    """
    if seen.unfreezes:
        return None
    missed = seen.parts(
        lambda one: one.trainable and one.gradient and not (one.optimized or one.moved) and bool(one.untrained)
    )
    if not missed:
        return None
    parts = named(missed, thresholds.mistakes.named_parts)
    return Finding(
        "parameter_not_in_optimizer",
        thresholds.confidence.mistake,
        evidence={"parts": float(len(missed)), "updates": float(seen.updates)},
        place=parts,
        suggestion=(
            f"{parts} got gradients in the first {seen.updates} updates, but no optimizer has them, so they do "
            "not change. Give their parameters to the optimizer in configure_optimizers, for example by "
            "self.parameters(), or set requires_grad to False if they must not change."
        ),
    )
