"""A detector that blames the batch for a loss above a limit."""

from __future__ import annotations

import math

from lightning_nanguard import Detector, Fault, Reading


class LossAbove(Detector):
    """Detects a finite loss above a limit that healthy batches never reach.

    Args:
        limit: The limit, in units of the loss.
    """

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def check(self, reading: Reading) -> Fault | None:
        """The fault of this reading, or ``None``."""
        # A loss that is not finite is left to NonFinite.
        if reading.loss is None or not self.limit < reading.loss < math.inf:
            return None
        message = f"the loss is {reading.loss:.4g}, above the limit of {self.limit:g}"
        # The user has set the limit, so the fault is certain, and no evidence is needed to blame the batch.
        return Fault("loss_above", "batch", "loss", reading.loss, message, conclusive=True)
