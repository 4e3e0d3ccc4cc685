"""How a learning rate is tried, cut and given back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class RateSearchThresholds:
    """How a learning rate is tried, cut and given back."""
