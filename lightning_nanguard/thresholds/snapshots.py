"""When snapshots are taken, certified and distrusted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class SnapshotsThresholds:
    """When snapshots are taken, certified and distrusted."""
