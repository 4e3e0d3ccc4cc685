"""What a guard counts and remembers from one intervention to the next."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import final

from lightning_nanguard.decide.state import PolicyState
from lightning_nanguard.state.snapshot import Snapshot


@final
@dataclass(slots=True)
class GuardState:
    """Counts that the parts of a guard share.

    Attributes:
        step: Attempted updates so far.
        healthy_steps: Healthy ones among them.
        healthy_since_restore: Those since the last restore; ``None`` before the first.
        bad_in_a_row: Bad batches since the last healthy one.
        policy: What the policy remembers.
        restored: The snapshot that the present intervention restored; ``None`` where it restored none.
        unrestored: What is still not finite after the present intervention has restored a snapshot, in words.
        rates: Step and effective learning rate of the first group, for each step at which it changed.
    """

    step: int = 0
    healthy_steps: int = 0
    healthy_since_restore: int | None = None
    bad_in_a_row: int = 0
    policy: PolicyState = field(default_factory=PolicyState)
    restored: Snapshot | None = None
    unrestored: str | None = None
    rates: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=1024))

    def note_rate(self, rate: float | None) -> None:
        """Remember the effective learning rate of this step, where it changed."""
        if rate is not None and (not self.rates or self.rates[-1][1] != rate):
            self.rates.append((self.step, rate))
