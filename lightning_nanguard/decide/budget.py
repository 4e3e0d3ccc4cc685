"""Bounds that make every loop of interventions end."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Budget:
    """Bounds that make every loop of interventions end.

    A count of skipped batches alone ends nothing unless you give one: a run that makes half of its updates may still
    reach its goal.

    Args:
        max_rollbacks: Restores within ``window`` updates.
        max_rollbacks_per_place: Restores for the same fault at the same place within ``window`` updates.
        max_bad_batches: Faulty updates in a row after which the run is stopped; ``None`` for ``window``.
        max_skip_share: Share of skipped updates among the last ``window``, once 32 were skipped, above which the run is
            stopped; ``None`` for no such bound.
        window: Length of the sliding window, in updates.

    Raises:
        ValueError: If a bound is out of its range.
    """

    max_rollbacks: int = 20
    max_rollbacks_per_place: int = 15
    max_bad_batches: int | None = None
    max_skip_share: float | None = None
    window: int = 1000

    def __post_init__(self) -> None:
        for name in ("max_rollbacks", "max_rollbacks_per_place", "max_bad_batches", "window"):
            value = getattr(self, name)
            if value is None and name == "max_bad_batches":
                continue
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"Budget({name}={value!r}): expected an integer of at least 1.")
        if self.max_skip_share is not None and not 0 < self.max_skip_share <= 1:
            raise ValueError(f"Budget(max_skip_share={self.max_skip_share!r}): expected a number above 0, at most 1.")
