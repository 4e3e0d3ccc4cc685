"""The table of where snapshots of common models lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.snapshot_places import CARD, GB, MODELS, place, snapshot_size, table
from lightning_nanguard.state.snapshot_room import Place
from lightning_nanguard.thresholds.snapshots import PlacementThresholds

DEVICES = Path(__file__).parents[2] / "docs" / "devices.md"


def test_the_docs_have_the_table_that_the_code_computes() -> None:
    """Whoever changes how a place is chosen sees the page change."""
    assert table() in DEVICES.read_text(encoding="utf-8")


def test_sizes_of_models_are_those_that_are_known() -> None:
    """Three copies of the parameters: weights and two moments."""
    billions = {name: sum(elements) / 1e9 for name, (elements, _) in MODELS.items()}
    assert list(billions.values()) == pytest.approx([0.124, 1.558, 6.738], rel=0.01)
    one = snapshot_size(*MODELS["GPT-2 124M, 32 bits"])
    assert one.beside[CARD] / GB == pytest.approx(0.124 * 12, rel=0.01)
    assert one.in_host > one.beside[CARD]


def test_a_larger_peak_and_more_processes_leave_less() -> None:
    """Snapshots of a model on a card of 80 GB: beside the weights, in the host, none."""
    one, limits = snapshot_size(*MODELS["GPT-2 1.5B, 32 bits"]), PlacementThresholds()
    assert place(one, 400 * GB, 128 * GB, 1, 0.5, limits) == Place(True, 3)
    assert place(one, 80 * GB, 512 * GB, 1, 0.9, limits) == Place(False, 3)
    assert place(one, 80 * GB, 128 * GB, 8, 0.9, limits).certified == 0
    assert place(one, 10 * GB, 512 * GB, 1, 0.9, limits).certified < 0, "the run itself does not fit"
