"""Where a run stands: what is counted and remembered from one intervention to the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from lightning_nanguard.decide.state import PolicyState
from lightning_nanguard.state.snapshot import Snapshot


@final
@dataclass(slots=True)
class GuardState:
    """Counts that the guard and its parts share; the guard alone counts.

    Attributes:
        step: Attempted updates so far.
        healthy_steps: Healthy ones among them.
        healthy_since_restore: Those since the last restore; ``None`` before the first.
        bad_in_a_row: Bad batches since the last healthy one.
        policy: What the policy remembers.
        restored: Where the intervention at hand went back to; ``None`` where it did not.
    """

    step: int = 0
    healthy_steps: int = 0
    healthy_since_restore: int | None = None
    bad_in_a_row: int = 0
    policy: PolicyState = field(default_factory=PolicyState)
    restored: Snapshot | None = None
