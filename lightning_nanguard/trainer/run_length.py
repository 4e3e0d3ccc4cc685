"""Estimates how many updates a run makes."""

from __future__ import annotations

import math

from lightning_nanguard.diagnosis.isolation import errors_logged
from lightning_nanguard.trainer.private.packages import Trainer


def expected_updates(trainer: Trainer) -> float:
    """Number of updates in the whole run; ``math.inf`` if it is not known or not limited."""
    with errors_logged("the length of the run is not known"):
        return float(trainer.estimated_stepping_batches)
    return math.inf
