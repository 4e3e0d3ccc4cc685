"""The benchmark of the recorder measures what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.recorder import STEP, measure

pytest.importorskip("matplotlib")


def test_a_long_run_is_cheap_and_small(tmp_path: Path) -> None:
    """Recording takes at most 0.2 % of a step of 10 ms, and the file and the page of a long run are small."""
    found = measure(50_000, 500, tmp_path)
    assert 0 < found.curve + found.norms < 0.002 * STEP
    assert 0 < found.file_bytes < 600_000
    assert 0 < found.page_bytes < 1_000_000
    assert found.page_seconds > 0
