"""When a number is evidence for a cause."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class DiagnosisThresholds:
    """When a number is evidence for a cause."""
