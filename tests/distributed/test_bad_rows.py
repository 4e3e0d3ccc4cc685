"""Rows of bad samples under several ranks: named with the rank that met them, and left out by all alike."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

from tests.distributed.conftest import run
from tests.scenarios.one_percent import BAD, COUNT, NOT_FINITE

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build has no gloo")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw of all fits."""
    folder = tmp_path_factory.mktemp("ranks")
    status, output = run([sys.executable, "-m", "tests.distributed.bad_rows", str(folder)])
    assert status == 0, output
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", ["small", "accumulated", "large", "first"])
def test_every_bad_row_is_listed_in_the_first_epoch(seen: list[dict[str, Any]], name: str) -> None:
    """Those that are not finite, whichever rank meets them, and no good one; the rank is named."""
    listed = seen[0][name]["listed"]
    assert {row for row, epoch, _ in listed if epoch == 0} >= NOT_FINITE
    assert {row for row, _, _ in listed} <= set(BAD)
    assert {rank for _, _, rank in listed} == {0, 1}
    assert {0.0, 1.0} >= set(seen[0][name]["ranks"]) > set()
    console = " ".join(seen[0][name]["said"])
    assert "of the data set, on rank" in console or "times, on rank" in console


@pytest.mark.parametrize("name", ["small", "accumulated", "large"])
def test_later_epochs_are_clean_on_all_ranks(seen: list[dict[str, Any]], name: str) -> None:
    """No intervention after the first epoch but for a finite row that is far off and gets out of proportion only then;
    as many batches as before, of fewer samples; the same weights."""
    later = {row for row, epoch, _ in seen[0][name]["listed"] if epoch > 0}
    assert later <= set(BAD) - NOT_FINITE
    for one in seen:
        assert sum(epoch > 0 for epoch in one[name]["epochs"]) <= len(later) <= 1
        assert one[name]["weights"] == seen[0][name]["weights"]
        assert one[name]["sizes"]["1"][0] == one[name]["sizes"]["0"][0]
    left = sum(one[name]["sizes"]["2"][1] for one in seen)
    assert COUNT - len(BAD) <= left <= COUNT - len(NOT_FINITE)


def test_a_resumed_run_is_clean_from_its_start(seen: list[dict[str, Any]]) -> None:
    """On both ranks, what the first run has found is left out."""
    for one in seen:
        assert one["resumed"]["epochs"] == []
        assert one["resumed"]["listed"] == []
