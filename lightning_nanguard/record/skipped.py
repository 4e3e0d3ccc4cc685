"""Reports if most updates of a run were skipped, because then hardly anything is learned."""

from __future__ import annotations

from lightning_nanguard.record.text import counted
from lightning_nanguard.thresholds.records import RECORDS, RecordsThresholds

TO_DO = (
    "read why the first of them was skipped (nanguard explain). If the data are bad, clean them. If an operation makes "
    "NaN of good data, correct it. If good batches with finite numbers were skipped, give their detector a larger "
    "limit, as in GradientSpike(ratio=…)"
)
"""What to do if most updates were skipped."""


def mostly_skipped(skipped: int, updates: int, thresholds: RecordsThresholds = RECORDS) -> str:
    """Say how many updates were skipped, if most of them were; else ``""``.

    Args:
        skipped: Number of skipped updates.
        updates: Number of all updates.
        thresholds: Which share counts as most, and as nearly all.

    Example:
        >>> mostly_skipped(191, 192)
        '191 of 192 updates were skipped: almost nothing was learned'
        >>> mostly_skipped(3, 192)
        ''
    """
    if updates < thresholds.least_updates_of_share or skipped < thresholds.share_skipped_most * updates:
        return ""
    nearly_all = skipped >= thresholds.share_skipped_nearly_all * updates
    learned = "almost nothing was learned" if nearly_all else "the run learned from less than half of its batches"
    return f"{min(skipped, updates):,} of {counted(updates, 'update')} were skipped: {learned}"
