"""Where one way to measure is cheaper than another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class MeasurementThresholds:
    """Where one way to measure is cheaper than another."""
