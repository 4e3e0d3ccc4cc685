"""A sink that logs interventions: the first of a kind in full, the 2nd, 4th, 8th … in one line each."""

from __future__ import annotations

import logging
from typing import final

from lightning_nanguard.errors import require
from lightning_nanguard.record.base import Sink
from lightning_nanguard.record.messages import Thinning
from lightning_nanguard.thresholds.records import RECORDS, RecordsThresholds
from lightning_nanguard.types import Intervention

_logger = logging.getLogger("lightning_nanguard")


@final
class Console(Sink):
    """Logs interventions at level WARNING: the first of a kind in full, the 2nd, 4th, 8th … in one line each.

    Interventions with the same fault, cause and remedies are one kind. An intervention that stops the run is always
    shown in full. With ``observe=True`` no stop ends the run, so only the first one is shown. The output depends on
    counts only, never on time. The line at the end of the fit counts all interventions.

    Args:
        thresholds: How many of a kind are all shown. After these, the count doubles from one to the next.

    Example:
        >>> Console().write(Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1))
    """

    def __init__(self, thresholds: RecordsThresholds = RECORDS) -> None:
        self._show_first = thresholds.shown_per_kind
        require(self._show_first >= 1, thresholds, "shown_per_kind", self._show_first, "at least 1")
        self._thinning = Thinning(self._show_first)

    def write(self, intervention: Intervention) -> None:
        """Show the intervention, or count it."""
        stopped = self._thinning.would_have_stopped
        text = self._thinning.shown(intervention)
        if text:
            _logger.warning("NaNGuard: %s", text)
        if self._thinning.would_have_stopped and not stopped:
            _logger.warning("NaNGuard: with observe=True the run goes on; further stops are not shown.")

    def close(self) -> None:
        """Forget which kinds were shown, so that the next fit shows them in full again."""
        self._thinning = Thinning(self._show_first)
