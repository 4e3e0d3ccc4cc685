"""Turns gradient clipping on."""

from __future__ import annotations

import math
from typing import Literal, final

from lightning_nanguard.act.base import Remedy, RunControl
from lightning_nanguard.errors import require
from lightning_nanguard.types import Clip, Evidence, Fault, PlanStep


@final
class ClipGradients(Remedy):
    """Turns gradient clipping on if gradients explode, and off again after many healthy updates.

    Args:
        clip_val: Largest norm (or absolute value), or ``"auto"``: twice the lower quartile of the healthy norms (1.0 if
            there were none).
        algorithm: ``"norm"`` or ``"value"``.
        recover_after: Healthy updates after which clipping ends.

    Raises:
        ValueError: If an argument is out of its range.
    """

    word = "clip"
    step = Clip

    def __init__(
        self,
        clip_val: float | Literal["auto"] = "auto",
        algorithm: Literal["norm", "value"] = "norm",
        recover_after: int = 1000,
    ) -> None:
        is_number = isinstance(clip_val, (int, float)) and not isinstance(clip_val, bool)
        valid = clip_val == "auto" or (is_number and 0 < float(clip_val) < math.inf)
        require(valid, self, "clip_val", clip_val, '"auto" or a finite number above 0')
        require(algorithm in ("norm", "value"), self, "algorithm", algorithm, '"norm" or "value"')
        require(
            clip_val != "auto" or algorithm == "norm",
            self,
            "algorithm",
            algorithm,
            '"norm" with clip_val="auto", which is taken from gradient norms',
        )
        require(recover_after >= 1, self, "recover_after", recover_after, "an integer of at least 1")
        self.clip_val = clip_val
        self.recover_after = recover_after
        self.algorithm = algorithm

    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        """Clipping, if it helps against the fault, or if a sudden large gradient came before the fault."""
        # If the scheduled rate has just risen, the rate is the likelier cause.
        concerned = fault.clipping_helps or evidence.burst
        if not concerned or not evidence.clippable or (evidence.rate_rose and attempt == 0):
            return None
        if isinstance(self.clip_val, str):
            if evidence.usual_norm is not None and evidence.usual_norm > 0:
                return Clip(2.0 * evidence.usual_norm, self.algorithm)
            # No norm is known yet: use the most common value.
            return Clip(1.0, self.algorithm)
        return Clip(float(self.clip_val), self.algorithm)

    def apply(self, step: PlanStep, run: RunControl) -> None:
        """Turn clipping on."""
        assert isinstance(step, Clip)
        run.clip(step.value, step.algorithm)
