"""Gives advice if many updates are skipped."""

from __future__ import annotations

from typing import final

from lightning_nanguard.thresholds.samples import SamplesThresholds
from lightning_nanguard.types import Finding, Intervention

_DEFAULTS = SamplesThresholds()


@final
class SkipShare:
    """Counts skipped updates, and gives advice once if their share is large.

    Args:
        thresholds: The share at which it gives advice.

    Example:
        >>> share = SkipShare()
        >>> skipped = Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1)
        >>> [share.note(skipped, updates) is not None for updates in (7, 20, 25, 30)]
        [False, False, True, False]
    """

    def __init__(self, thresholds: SamplesThresholds = _DEFAULTS) -> None:
        self._limits = thresholds
        self._skipped = 0
        self._said = False

    def note(self, intervention: Intervention, updates: int) -> Finding | None:
        """Count an intervention; return advice if the share of skipped updates is now large.

        Args:
            intervention: The intervention.
            updates: Updates attempted so far.
        """
        if "skip" not in intervention.remedies or not intervention.applied:
            return None
        self._skipped += 1
        share = self._skipped / max(1, updates)
        if self._said or updates < self._limits.least_updates or share <= self._limits.skipped_share:
            return None
        self._said = True
        return Finding(
            "many_skipped_batches",
            self._limits.skipped_confidence,
            {"skipped": float(self._skipped), "updates": float(updates)},
            suggestion=(
                f"{self._skipped:,} of {updates:,} updates were skipped. If only some samples of their batches are "
                "bad, add SkipStep(keep_good_samples=True) to the remedies: the update of a bad batch is then made "
                "from its good samples. NaNGuard(quarantine=True) leaves out samples that were found to be bad."
            ),
        )
