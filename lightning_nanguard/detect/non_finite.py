"""Detects a loss or gradient that is not finite."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, final

from lightning_nanguard.detect.base import Detector, Limits
from lightning_nanguard.errors import require
from lightning_nanguard.types import Fault, Reading


@final
class NonFinite(Detector):
    """A loss or a gradient that holds NaN or Inf, or a gradient so large that its square would overflow.

    An fp16 overflow that the GradScaler skips by itself is left to it, until ``overflow_patience`` of them come in a
    row or its scale falls below ``min_loss_scale``: then no scale helps, and the learner is at fault.

    Args:
        overflow_patience: Overflows in a row that are still the scaler's business.
        min_loss_scale: Loss scale below which an overflow is a fault.

    Raises:
        ValueError: When an argument is not positive.

    Example:
        >>> NonFinite().check(Reading(step=3, optimizer_index=0, loss=float("nan"), grad_norm=1.0, finite=False,
        ...                           loss_finite=False)).kind
        'non_finite_loss'
    """

    # Adam squares the gradient in float32: beyond this norm a second moment becomes Inf and stays so.
    _square_overflows = 1e18

    def __init__(self, overflow_patience: int = 20, min_loss_scale: float = 1.0) -> None:
        require(overflow_patience >= 1, self, "overflow_patience", overflow_patience, "an integer of at least 1")
        require(min_loss_scale > 0, self, "min_loss_scale", min_loss_scale, "a number above 0")
        self.overflow_patience = overflow_patience
        self.min_loss_scale = min_loss_scale
        self._overflows: deque[int] = deque(maxlen=overflow_patience)

    def check(self, reading: Reading) -> Fault | None:
        """The fault of this reading, or ``None``."""
        if not reading.loss_finite:
            return Fault("non_finite_loss", "batch", "loss", reading.loss, f"the loss is {reading.loss}")
        if not reading.finite:
            return self._gradient(reading)
        if reading.grad_norm is not None and reading.grad_norm > self._square_overflows:
            return Fault(
                "gradient_overflow",
                "batch",
                "gradient",
                reading.grad_norm,
                f"the gradient norm is {reading.grad_norm:.3g}; its square overflows float32",
            )
        return None

    def _gradient(self, reading: Reading) -> Fault | None:
        if not reading.scaler_skips:
            return Fault("non_finite_gradient", "batch", "gradient", reading.grad_norm, "a gradient is not finite")
        scale = reading.loss_scale
        in_a_row = len(self._overflows) + 1
        if in_a_row < self.overflow_patience and (scale is None or scale >= self.min_loss_scale):
            return None
        return Fault(
            "loss_scale_collapse",
            "learner",
            "gradient",
            scale,
            f"{in_a_row} fp16 overflows in a row took the loss scale down to {scale}, and still the gradient overflows",
        )

    def accept(self, reading: Reading) -> None:
        """Count overflows in a row."""
        if reading.scaler_skips:
            self._overflows.append(reading.step)
        elif self._overflows:
            self._overflows.clear()

    def limits(self) -> Limits:
        """Anything finite whose square is."""
        return Limits(math.inf, self._square_overflows)

    def rewind(self, step: int) -> None:
        """Start counting overflows anew."""
        self._overflows.clear()

    def state_dict(self) -> dict[str, Any]:
        """The history in plain containers."""
        return {"overflows": list(self._overflows)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._overflows.clear()
        self._overflows.extend(int(step) for step in state["overflows"])
