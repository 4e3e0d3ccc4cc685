"""Bounds that make every loop of interventions end."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Budget:
    """Bounds that make every loop of interventions end.

    Args:
        max_rollbacks: Restores within ``window`` updates.
        max_rollbacks_per_place: Restores for the same fault at the same place within ``window`` updates.
        max_bad_batches: Faulty updates in a row.
        max_skip_share: Share of skipped updates among the last ``window``, once ``max_bad_batches`` were skipped.
        window: Length of the sliding window, in updates.

    Raises:
        ValueError: When a bound is out of its range.
    """

    max_rollbacks: int = 20
    max_rollbacks_per_place: int = 15
    max_bad_batches: int = 32
    max_skip_share: float = 0.5
    window: int = 1000

    def __post_init__(self) -> None:
        for name in ("max_rollbacks", "max_rollbacks_per_place", "max_bad_batches", "window"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"Budget({name}={value!r}): expected an integer of at least 1.")
        if not 0 < self.max_skip_share <= 1:
            raise ValueError(f"Budget(max_skip_share={self.max_skip_share!r}): expected a number above 0, at most 1.")
