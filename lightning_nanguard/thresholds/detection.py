"""When a reading counts as a fault."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class DetectionThresholds:
    """When a reading counts as a fault."""
