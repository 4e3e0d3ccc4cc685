"""When snapshots are taken, certified and distrusted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class SnapshotsThresholds:
    """When snapshots are taken, certified and distrusted."""

    same_level: float = 0.1
    certify_anyway: int = 100
    keep_start: int = 1000
