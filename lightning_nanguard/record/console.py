"""A sink that logs interventions: the first of a kind in full, the 2nd, 4th, 8th … in one line each."""

from __future__ import annotations

import logging
from collections import Counter
from typing import final

from lightning_nanguard.errors import require
from lightning_nanguard.record.base import Sink
from lightning_nanguard.record.messages import tell, tell_again
from lightning_nanguard.thresholds.records import RECORDS, RecordsThresholds
from lightning_nanguard.types import Intervention, Kind

_logger = logging.getLogger("lightning_nanguard")


@final
class Console(Sink):
    """Logs interventions at level WARNING: the first of a kind in full, the 2nd, 4th, 8th … in one line each.

    Interventions with the same fault, cause and remedies are one kind. An intervention that stops the run is always
    shown in full. The output depends on counts only, never on time. The line at the end of the fit counts all
    interventions.

    Args:
        thresholds: How many of a kind are all shown. After these, the count doubles from one to the next.

    Example:
        >>> Console().write(Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1))
    """

    def __init__(self, thresholds: RecordsThresholds = RECORDS) -> None:
        self._show_first = thresholds.shown_per_kind
        require(self._show_first >= 1, thresholds, "shown_per_kind", self._show_first, "at least 1")
        self._seen: Counter[Kind] = Counter()

    def write(self, intervention: Intervention) -> None:
        """Show the intervention, or count it."""
        self._seen[intervention.kind] += 1
        seen = self._seen[intervention.kind]
        doublings, rest = divmod(seen, self._show_first)
        if seen == 1 or intervention.ends_run:
            _logger.warning("NaNGuard: %s", tell(intervention))
        elif seen <= self._show_first or (rest == 0 and doublings & (doublings - 1) == 0):
            _logger.warning("NaNGuard: %s (%s so far)", tell_again(intervention), f"{seen:,}")

    def close(self) -> None:
        """Forget which kinds were shown, so that the next fit shows them in full again."""
        self._seen.clear()
