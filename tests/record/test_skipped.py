"""A run of which most updates were skipped is told as such."""

from __future__ import annotations

import pytest

from lightning_nanguard.record.skipped import mostly_skipped


@pytest.mark.parametrize(
    ("skipped", "updates", "told"),
    [
        (191, 192, "191 of 192 updates were skipped: almost nothing was learned"),
        (100, 192, "100 of 192 updates were skipped: the run learned from less than half of its batches"),
        (250, 192, "192 of 192 updates were skipped: almost nothing was learned"),
        (95, 192, ""),
        (19, 19, ""),
        (0, 0, ""),
    ],
)
def test_the_share_of_skipped_updates(skipped: int, updates: int, told: str) -> None:
    """It is told from a half on, and after enough updates; steps that were trained twice make it no more than all."""
    assert mostly_skipped(skipped, updates) == told
