"""Detects a loss that does not depend on trained parameters."""

from __future__ import annotations

from lightning_nanguard.diagnosis.mistakes.observation import Observation
from lightning_nanguard.thresholds.diagnosis import DiagnosisThresholds
from lightning_nanguard.types import Finding


def loss_without_graph(seen: Observation, thresholds: DiagnosisThresholds) -> Finding | None:
    """Every loss is a new tensor without a graph, or no parameter ever got a gradient from it.

    If parameters change all the same, they are trained in another way, for example within the backward pass.
    """
    nobody = seen.parameters and not any(one.gradient for one in seen.parameters)
    learns = any(one.trainable and one.moved for one in seen.parameters)
    if not seen.losses or learns or not (seen.graphless == seen.losses or nobody):
        return None
    return Finding(
        "loss_without_graph",
        thresholds.confidence.mistake,
        evidence={"losses": float(seen.losses), "updates": float(seen.updates)},
        place="loss",
        suggestion=(
            f"no parameter got a gradient in the first {seen.updates} updates: the loss does not depend on any trained "
            "parameter. Look for torch.tensor(loss), item(), detach() or numpy() between the model and the loss that "
            "training_step returns."
        ),
    )
