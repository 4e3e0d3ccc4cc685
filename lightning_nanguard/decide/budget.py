"""Limits on interventions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)  # without slots, because jsonargparse refers to it weakly
class Budget:
    """Limits how often the guard may act. The run is stopped when a limit is exceeded.

    By default skipped batches alone do not stop a run, because a run with half of its updates may still reach its goal.

    Args:
        max_rollbacks: Number of rollbacks within ``window`` updates; one more stops the run.
        max_rollbacks_per_place: The same number for one fault at one place.
        max_bad_batches: Number of bad updates in a row that are skipped; the next one stops the run. ``None`` means
            ``window``.
        max_skip_share: Share (0 to 1) of skipped updates among the last ``window``, once 32 were skipped; ``None`` for
            no limit.
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
