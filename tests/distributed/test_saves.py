"""Saves of several ranks."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.conftest import Launch
from tests.distributed.data import AT, STEPS

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build has no gloo"),
    pytest.mark.timeout(450),  # the first test of a suite waits for all its ranks
]


@pytest.mark.parametrize("rank", [0, 1])
def test_no_rank_writes_poison(launched: Launch, rank: int) -> None:
    """A weight lost on one rank right before a save: every file is there and good, and all ranks went back together."""
    results = launched("fork", 2, "saves")
    seen = [result[f"lost {rank}"] for result in results]
    assert [one["error"] for one in seen] == [None, None]
    assert [one["bad"] for one in seen] == [[], []]
    assert seen[0]["files"] == STEPS + 1
    assert seen[0]["end"] == seen[1]["end"]
    assert seen[0]["records"] == seen[1]["records"]
    assert [record["remedies"] for record in seen[0]["records"]] == [["restore"]]


def test_a_late_fault_is_read_before_a_save(launched: Launch) -> None:
    """A corrupt sample of one rank, not yet read when a save is asked for: all look at it together, and then save."""
    one, other = (result["late"] for result in launched("fork", 2, "saves"))
    assert (one["error"], other["error"]) == (None, None)
    assert (one["records"], one["end"], one["bad"]) == (other["records"], other["end"], [])
    (record,) = one["records"]
    assert (record["batch_idx"], record["remedies"]) == (AT, ["restore"])
    assert (record["ranks"], record["cause"]) == ([1], "non_finite_input")


def test_ranks_go_on(launched: Launch) -> None:
    """From a checkpoint at the end of an epoch all ranks go on as if they had not stopped."""
    for result in launched("fork", 2, "saves"):
        resumed, whole = result["resumed"], result["two epochs"]
        assert (resumed["error"], resumed["records"]) == (None, [])
        assert (resumed["steps"], resumed["end"]) == (2 * STEPS, whole["end"])


@pytest.mark.parametrize("rank", [0, 1])
def test_the_last_good_file_under_ddp(launched: Launch, rank: int) -> None:
    """The file is of a late update, and a folder that rank 0 cannot make neither stops nor parts the ranks."""
    results = launched("fork", 2, "saves")
    assert results[0][f"lost {rank}"]["kept"] >= STEPS - 5
    blocked = [result["blocked"] for result in results]
    assert [one["error"] for one in blocked] == [None, None]
    assert [one["steps"] for one in blocked] == [STEPS, STEPS]
    assert blocked[0]["end"] == blocked[1]["end"]
