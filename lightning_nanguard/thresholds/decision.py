"""Who is blamed for a fault, and what follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class DecisionThresholds:
    """Who is blamed for a fault, and what follows."""
