"""Detects a loss or gradient that is not finite."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar, final

from lightning_nanguard.detect.base import Detector, Limits
from lightning_nanguard.errors import require
from lightning_nanguard.thresholds.detection import NonFiniteThresholds
from lightning_nanguard.thresholds.fixed import LEAST_LOSS_SCALE
from lightning_nanguard.types import Fault, Reading

LOSS_SCALE = "scale of the GradScaler"
"""Where the fault of a bad loss scale is."""


@final
class NonFinite(Detector):
    """Detects a loss or a gradient that holds NaN or Inf, or a gradient so large that its square would overflow.

    An fp16 overflow that the GradScaler skips by itself is no fault, until ``overflow_patience`` of them come in a row.
    Then a lower scale does not help, and the learner is at fault. Before the first update the scaler still searches its
    scale, so that overflows are no fault down to the smallest scale there is. A loss scale that is not finite, or that
    grew too much since the last update, is a fault of the state.

    Args:
        overflow_patience: Number of overflows in a row that is a fault; the scaler handles fewer.
        min_loss_scale: Loss scale below which an overflow is a fault after the first update; ``None`` for no limit,
            because a loss that is large by its unit needs a small scale.
        thresholds: Further thresholds, ``None`` for the defaults.

    Raises:
        ValueError: If an argument is not positive.

    Example:
        >>> NonFinite().check(Reading(step=3, optimizer_index=0, loss=float("nan"), grad_norm=1.0, finite=False,
        ...                           loss_finite=False)).kind
        'non_finite_loss'
    """

    judges_line_search: ClassVar[bool] = True

    def __init__(
        self,
        overflow_patience: int = 20,
        min_loss_scale: float | None = None,
        *,
        thresholds: NonFiniteThresholds | None = None,
    ) -> None:
        require(overflow_patience >= 1, self, "overflow_patience", overflow_patience, "an integer of at least 1")
        least = min_loss_scale
        require(least is None or least > 0, self, "min_loss_scale", least, "a number above 0, or None")
        self.overflow_patience = overflow_patience
        self.min_loss_scale = min_loss_scale
        self.thresholds = thresholds or NonFiniteThresholds()
        self._overflows: deque[int] = deque(maxlen=overflow_patience)
        self._scale = math.inf  # loss scale of the last accepted update
        self._updated = False  # whether an update was accepted, so that the scaler has found its scale

    def check(self, reading: Reading) -> Fault | None:
        """The fault of this reading, or ``None``."""
        norm, scale = reading.grad_norm, reading.loss_scale
        if not reading.finite and scale is not None and not self._may_be(scale):
            # The scaler halves the scale after an overflow. That does not change Inf, and takes too long from 1e30.
            message = f"the scale of the GradScaler is {scale:g}"
            return Fault("corrupted_state", "state", LOSS_SCALE, scale, message)
        if not reading.loss_finite:
            message = f"the loss is {reading.loss}"
            # With a finite gradient the update is not bad, so neither the weights nor the rate are at fault.
            infinite = reading.loss_is_bad_alone and reading.loss is not None and math.isinf(reading.loss)
            alone = infinite and norm is not None and norm <= self.thresholds.max_norm
            return Fault(
                "non_finite_loss", "batch", "loss", reading.loss, message, conclusive=alone, clipping_helps=True
            )
        if not reading.finite:
            if reading.scaler_skips:
                return self._overflow(reading)
            message = "a gradient is not finite"
            return Fault("non_finite_gradient", "batch", "gradient", norm, message, clipping_helps=True)
        if norm is not None and norm > self.thresholds.max_norm:
            message = f"the gradient norm is {norm:.3g}; its square overflows float32, or nearly does"
            return Fault("gradient_overflow", "batch", "gradient", norm, message, clipping_helps=True)
        return None

    def _overflow(self, reading: Reading) -> Fault | None:
        scale = reading.loss_scale
        in_a_row = len(self._overflows) + 1
        least, too_many = 2 * LEAST_LOSS_SCALE, False
        if self._updated:
            least, too_many = self.min_loss_scale or least, in_a_row >= self.overflow_patience
        if not too_many and (scale is None or scale >= least):
            return None
        # Before the first update there may have been more overflows than are counted.
        row = f"{in_a_row} fp16 overflows in a row" if in_a_row > 1 and self._updated else "fp16 overflows"
        message = f"{row} took the loss scale down to {scale}, and the gradient still overflows"
        return Fault("loss_scale_collapse", "learner", "gradient", scale, message, proof="none")

    def accept(self, reading: Reading) -> None:
        """Count overflows in a row."""
        if reading.loss_scale is not None:
            self._scale = reading.loss_scale
        if reading.scaler_skips:
            self._overflows.append(reading.step)
            return
        self._updated = True
        if self._overflows:
            self._overflows.clear()

    def limits(self) -> Limits:
        """Any finite loss, and any gradient norm whose square is finite."""
        return Limits(math.inf, self.thresholds.max_norm)

    def rewind(self, step: int) -> None:
        """Restart the count of overflows."""
        self._overflows.clear()

    def _may_be(self, scale: float) -> bool:
        own = self.thresholds
        return LEAST_LOSS_SCALE <= scale < math.inf and scale <= own.scale_growth * self._scale

    def state_dict(self) -> dict[str, Any]:
        """The history in plain containers."""
        return {"overflows": list(self._overflows), "scale": self._scale, "updated": self._updated}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._overflows.clear()
        self._overflows.extend(int(step) for step in state["overflows"])
        self._scale = float(state.get("scale", math.inf))
        self._updated = bool(state.get("updated", True))
