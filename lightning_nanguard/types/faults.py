"""What is measured of an update, and what a detector finds in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

Scope = Literal["batch", "learner", "state"]
"""What is at fault: one batch, the learner (weights, rate, clipping), or state that went bad by itself."""


class Reading(NamedTuple):
    """The numbers that were measured about one update, on the host.

    It is a named tuple, because one is made in every step and this is the cheapest immutable record.

    Attributes:
        step: The guard's own count of attempted updates; it never goes back.
        optimizer_index: Index of the optimizer; each optimizer has its own history.
        loss: Mean loss of the update's micro-batches, unscaled; ``None`` if the update had no loss.
        grad_norm: 2-norm of the gradient before clipping, unscaled; ``None`` if there was no gradient.
        finite: Whether every loss of the update and every element of its gradient is finite.
        loss_finite: Whether every loss of the update is finite.
        scaler_skips: Whether a GradScaler skips this update by itself (fp16 overflow).
        loss_scale: The GradScaler's scale, ``None`` without one.
    """

    step: int
    optimizer_index: int
    loss: float | None
    grad_norm: float | None
    finite: bool = True
    loss_finite: bool = True
    scaler_skips: bool = False
    loss_scale: float | None = None

    @property
    def gradient_finite(self) -> bool:
        """Whether the gradient is finite, as far as it was measured."""
        return self.grad_norm is None or math.isfinite(self.grad_norm)

    @property
    def loss_is_bad_alone(self) -> bool:
        """Whether the loss is not finite and the gradient is, so that nothing bad would reach the weights."""
        bad = self.loss is not None and not self.loss_finite
        return bad and self.grad_norm is not None and self.gradient_finite

    @property
    def stream(self) -> int:
        """The former name of :attr:`optimizer_index`, for detectors written for version 0.1.0."""
        return self.optimizer_index


Proof = Literal["trial", "none"]
"""What confirms the suspicion that the learner diverged, before anything is changed.

``"trial"``: a lower rate learns, from an earlier state, what the run does not. ``"none"``: nothing has to be confirmed.
"""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that a detector found.

    The first five attributes say what was found and where. ``scope`` and all attributes from ``doubtful`` on are
    traits. Only these decide how the guard treats a fault, so your own fault is treated like a built-in one.

    Attributes:
        kind: A short identifier, such as ``"non_finite_loss"``. It is shown and recorded; no decision depends on it.
        scope: What is at fault: the batch, the learner or the state.
        place: Where it was found: ``"loss"``, ``"gradient of encoder.0.weight"``, ``"buffer bn.running_mean"``.
        value: The number by which it was detected, ``None`` if there is none.
        message: One sentence for the user.
        doubtful: True if it counts as a fault only when the batch holds numbers far larger than recent healthy batches;
            otherwise the reading is accepted. Example: a high gradient norm during warm-up.
        certain: True if a number is not finite or overflows, such as a NaN loss; False if it is finite but unusual and
            may be harmless, such as a gradient spike. With ``NaNGuard(act_on="certain")``, the default, a fault that is
            not certain only leads to advice.
        extreme: True if the value is far larger than every value accepted before. A finite fault of a batch counts as
            certain if it is extreme and the inputs of the batch are far larger than those before, too.
        proof: What has to confirm that the learner diverged.
        clipping_helps: True if gradient clipping helps against the fault.
        rate_may_cause: True if a learning rate can explain bad state. The learner is blamed instead if the rate has
            risen since the snapshot, or if the updates make the state bad again when they are made again.
        conclusive: True if the detector has already established that ``scope`` is at fault, so that no further evidence
            can change it. Example: statistics were in range before a batch and far out of range after it.
        only_if_corrupt: True if the guard acts only if a tensor of the learner is not finite, and otherwise only
            records the fault. Example: a validation loss that is not finite.
    """

    kind: str
    scope: Scope
    place: str
    value: float | None = None
    message: str = ""
    doubtful: bool = False
    certain: bool = True
    extreme: bool = False
    proof: Proof = "trial"
    clipping_helps: bool = False
    rate_may_cause: bool = False
    conclusive: bool = False
    only_if_corrupt: bool = False
