"""How long ranks wait, and what they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class DistributedThresholds:
    """How long ranks wait, and what they share."""
