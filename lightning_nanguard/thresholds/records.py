"""How much is recorded, shown and kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class RecordsThresholds:
    """How much is recorded, shown and kept."""
