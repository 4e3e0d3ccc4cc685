"""How many batches are kept, and when one is strange."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class BatchesThresholds:
    """How many batches are kept, and when one is strange."""
