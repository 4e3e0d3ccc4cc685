"""Chooses which interventions are shown: the first of a kind in full, the 2nd, 4th, 8th … in one line each."""

from __future__ import annotations

from collections import Counter
from typing import final

from lightning_nanguard.record.messages import tell, tell_again
from lightning_nanguard.types import Intervention, Kind


@final
class Thinning:
    """Chooses which interventions are shown, and how. It depends on counts only, never on time.

    Interventions with the same fault, cause and remedies are one kind. An intervention that stops the run is always
    shown in full. With ``observe=True`` no stop ends the run, so only the first one is shown.

    Args:
        show_first: How many of a kind are all shown. After these, the count doubles from one to the next.
        everything: Whether all are shown, the first of a kind in full.

    Example:
        >>> thinning, skip = Thinning(), Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1)
        >>> [len(thinning.shown(skip).splitlines()) for _ in range(8)]
        [2, 1, 0, 1, 0, 0, 0, 1]
    """

    def __init__(self, show_first: int = 1, *, everything: bool = False) -> None:
        self._show_first = show_first
        self._everything = everything
        self._seen: Counter[Kind] = Counter()
        self.would_have_stopped = False
        """Whether a stop of an observed run was shown."""

    def shown(self, intervention: Intervention) -> str:
        """The text of the next intervention; empty if it is not shown.

        Args:
            intervention: The intervention.
        """
        if "stop" in intervention.remedies and not intervention.applied:
            if self.would_have_stopped and not self._everything:
                return ""
            self.would_have_stopped = True
        self._seen[intervention.kind] += 1
        seen = self._seen[intervention.kind]
        doublings, rest = divmod(seen, self._show_first)
        if seen == 1 or intervention.ends_run:
            return tell(intervention)
        if self._everything:
            return tell_again(intervention)
        if seen <= self._show_first or (rest == 0 and doublings & (doublings - 1) == 0):
            return f"{tell_again(intervention)} ({seen:,} so far)"
        return ""
