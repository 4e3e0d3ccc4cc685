"""A sink that logs one line per intervention."""

from __future__ import annotations

import logging
from typing import NamedTuple, final

from lightning_nanguard.errors import require
from lightning_nanguard.record.base import Sink
from lightning_nanguard.record.messages import counted, describe
from lightning_nanguard.thresholds.records import RECORDS, RecordsThresholds
from lightning_nanguard.types import Intervention

_logger = logging.getLogger("lightning_nanguard")


@final
class Console(Sink):
    """Logs one readable line per intervention at level WARNING, ever fewer when the same thing keeps happening.

    Interventions of one fault with the same remedies are one kind. The first ten of a kind are shown, then the 20th,
    40th, 80th … with the number left out in between; one that stops the run is always shown. What is shown depends on
    counts only, never on time. :meth:`close` says how many were not shown and starts counting anew.

    Args:
        thresholds: How many of a kind are shown before they are thinned out.

    Example:
        >>> Console().write(Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1))
    """

    def __init__(self, thresholds: RecordsThresholds = RECORDS) -> None:
        self._thresholds = thresholds
        self._show_first = thresholds.shown_per_kind
        require(self._show_first >= 1, thresholds, "shown_per_kind", self._show_first, "at least 1")
        self._kinds: dict[tuple[str, tuple[str, ...]], _Kind] = {}

    def write(self, intervention: Intervention) -> None:
        """Show the intervention, or count it."""
        key = (intervention.fault, intervention.remedies)
        kind = self._kinds.get(key, _Kind(seen=0, shown=0, next_shown=1))
        seen = kind.seen + 1
        if seen < kind.next_shown and "stop" not in intervention.remedies:
            self._kinds[key] = kind._replace(seen=seen)
            return
        left_out = seen - 1 - kind.last_shown
        note = f" (and {left_out:,} more like it since the last one shown)" if left_out else ""
        if seen == self._show_first:
            note += " (more like it will be shown ever more rarely)"
        _logger.warning("NaNGuard: %s%s", describe(intervention, self._thresholds), note)
        next_shown = kind.next_shown
        if seen >= next_shown:
            next_shown = seen + 1 if seen < self._show_first else 2 * seen
        self._kinds[key] = _Kind(seen, kind.shown + 1, next_shown, last_shown=seen)

    def close(self) -> None:
        """Say how many were not shown."""
        seen = sum(kind.seen for kind in self._kinds.values())
        hidden = seen - sum(kind.shown for kind in self._kinds.values())
        self._kinds.clear()
        if hidden:
            _logger.warning("NaNGuard: %s of %s were not shown here.", f"{hidden:,}", counted(seen, "intervention"))


class _Kind(NamedTuple):
    seen: int
    shown: int
    next_shown: int
    last_shown: int = 0
