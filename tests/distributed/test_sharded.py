"""Sharded strategies in whole Trainer runs, two gloo processes on the CPU."""

from __future__ import annotations

import math

import pytest
import torch

from tests.distributed.conftest import Launch, Results
from tests.distributed.data import AT, STEPS
from tests.distributed.sharding import KINDS

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build has no gloo"),
    pytest.mark.timeout(450),  # the first test of a suite waits for all its ranks
]

LAYOUTS = [("fsdp2", "whole"), ("fsdp2", "shards"), ("fsdp1", "shards")]
FAULTS = {
    # What: fault, remedies, within how many updates.
    "sample": ("non_finite_loss", ["skip"], 0),
    "loss": ("non_finite_loss", ["skip"], 0),
    "spike": ("gradient_spike", ["skip"], 0),
    "gradient": ("non_finite_gradient", ["restore"], 1),
    "weight": ("non_finite_loss", ["restore"], 0),
    "moment": ("corrupted_state", ["restore"], 6),
    "buffer": ("corrupted_state", ["restore"], 6),
    "accumulated": ("non_finite_loss", ["skip"], 0),
}


@pytest.fixture
def seen(launched: Launch) -> Results:
    """What two ranks saw of all kinds of sharding."""
    return launched("fork", 2, "sharded")


@pytest.fixture
def plain(launched: Launch) -> Results:
    """What two ranks saw in loops without a Trainer."""
    return launched("fork", 2, "plain")


@pytest.mark.parametrize("kind", KINDS)
def test_a_healthy_sharded_run_is_the_same(seen: Results, kind: str) -> None:
    """Every bit of each rank's shards is as without the guard, and nothing is on record."""
    for result in seen:
        assert result[f"{kind} healthy"]["end"] == result[f"{kind} bare"]["end"]
        assert result[f"{kind} healthy"]["records"] == []


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_one_ranks_fault_under_a_sharded_strategy(seen: Results, kind: str, rank: int, fault: str) -> None:
    """Both do the same and name the rank; each shard is as if the batch had never come, or as it was at the step gone
    back to, bit by bit."""
    fault_kind, remedies, within = FAULTS[fault]
    one, other = (result[f"{kind} {fault} {rank}"] for result in seen)
    assert one["records"] == other["records"]
    (record,) = one["records"]
    assert (record["fault"], record["remedies"], record["ranks"]) == (fault_kind, remedies, [rank])
    assert 0 <= record["batch_idx"] - AT <= within
    for result in seen:
        mine = result[f"{kind} {fault} {rank}"]
        assert mine["error"] is None
        assert mine["finite"]
        if remedies == ["skip"]:
            left_out = "without window" if fault == "accumulated" else "without"
            said = any("one bad micro-batch makes the guard skip the whole update" in line for line in mine["said"])
            assert said == (fault == "accumulated")
            assert mine["end"] == result[f"{kind} {left_out}"]["end"]
        else:
            assert mine["after"] == [mine["by_step"][str(record["snapshot_step"])]]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_named_under_a_sharded_strategy(seen: Results, kind: str, rank: int) -> None:
    """Rank 0 writes the cause that another rank's batch shows."""
    (record,) = seen[0][f"{kind} sample {rank}"]["records"]
    assert (record["cause"], record["finding"]["samples"]) == ("non_finite_input", [1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_diverging_sharded_run(seen: Results, kind: str) -> None:
    """Both go back, clip by the norm of all shards and cut the rate alike, and what is left is finite."""
    one, other = (result[f"{kind} diverged"] for result in seen)
    assert one["records"] == other["records"]
    assert one["records"][0]["remedies"] == ["restore", "clip", "scale"]
    assert one["lr_multiplier"] == other["lr_multiplier"] < 1
    assert (one["error"], one["finite"], other["finite"]) == (None, True, True)


@pytest.mark.parametrize("place", ["loss", "gradient", "weight"])
@pytest.mark.parametrize("kind", KINDS)
def test_late_reading_of_shards(seen: Results, kind: str, place: str) -> None:
    """In deferred readback both go back together, bit by bit, and the record is of the faulty batch."""
    for result in seen:
        mine = result[f"{kind} deferred {place}"]
        assert mine["records"] == seen[0][f"{kind} deferred {place}"]["records"]
        (record,) = mine["records"]
        assert (record["batch_idx"], record["remedies"]) == (AT, ["restore"])
        assert mine["after"] == [mine["by_step"][str(record["snapshot_step"])]]
        assert mine["finite"]


@pytest.mark.parametrize("kind", KINDS)
def test_observing_shards_changes_nothing(seen: Results, kind: str) -> None:
    """With observe=True both record what they would have done, and neither does anything."""
    one, other = (result[f"{kind} observed"] for result in seen)
    assert one["records"] == other["records"]
    assert one["records"][0]["remedies"] == ["skip"]
    assert not any(record["applied"] for record in one["records"])
    assert not one["finite"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
def test_no_poisoned_shard(seen: Results, kind: str, layout: str, rank: int) -> None:
    """A weight lost in one rank's shard right before a save: every file or folder is there and good, the last good one
    too, and both ranks went back together."""
    one, other = (result[f"{kind} saved {layout} {rank}"] for result in seen)
    assert (one["error"], other["error"]) == (None, None)
    assert (one["files"], one["bad"], one["kept"]) == (2, [], True)
    assert one["records"] == other["records"]
    assert [(record["remedies"], record["ranks"]) for record in one["records"]] == [(["restore"], [rank])]


@pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
def test_a_save_of_shards_within_a_batch(seen: Results, kind: str, layout: str) -> None:
    """The last good shards are written, and the run is helped at the end of the batch."""
    for result in seen:
        mine = result[f"{kind} within {layout}"]
        assert mine["saved"]
        assert mine["finite"]
        assert [record["remedies"] for record in mine["records"]] == [["rewrite"], ["restore"]]
        assert mine["error"] is None


@pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
def test_a_sharded_run_goes_on(seen: Results, kind: str, layout: str) -> None:
    """From a checkpoint of the guard a run goes on to the bits that it ends with without the guard."""
    for result in seen:
        resumed = result[f"{kind} resumed {layout}"]
        assert resumed["error"] is None
        assert resumed["steps"] == 2 * STEPS
        assert resumed["end"] == result[f"{kind} resumed bare {layout}"]["end"]


@pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
def test_a_poisoned_sharded_checkpoint_is_refused(seen: Results, kind: str, layout: str) -> None:
    """What a run without the guard has lost is not gone on from: a whole file by name, shards at the start."""
    told = "BadCheckpointError" if layout == "whole" else "TrainingDivergedError: parameter"
    assert all(result[f"{kind} refused {layout}"]["error"].startswith(told) for result in seen)


@pytest.mark.parametrize("kind", KINDS)
def test_no_collective_in_a_healthy_sharded_update(seen: Results, kind: str) -> None:
    """A trace of a run's updates holds as many with the guard as without."""
    for result in seen:
        one, other = (result[f"{kind} {name}"]["collectives"] for name in ("healthy", "bare"))
        assert one == other > 0


@pytest.mark.parametrize("kind", KINDS)
def test_late_reading_looks_at_the_batch_of_shards(seen: Results, kind: str) -> None:
    """Corrupt samples that are read late are found in the batch of the update that is over, and no rate is cut."""
    for result in seen:
        mine = result[f"{kind} deferred samples"]
        told = [(record["batch_idx"], record["remedies"], record["cause"]) for record in mine["records"]]
        skipped = [(index, ["skip"], "non_finite_input") for index in (19, 23, 27)]
        assert told == [(15, ["restore"], "non_finite_input"), *skipped]
        assert mine["lr_multiplier"] == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_one_ranks_validation_loss_under_a_sharded_strategy(seen: Results, kind: str) -> None:
    """It is on record with the next update, and nothing is changed; a NaN metric counts as no fault."""
    for result in seen:
        assert result[f"{kind} validation"]["error"] is None
        (record,) = result[f"{kind} validation"]["records"]
        assert (record["fault"], record["remedies"], record["ranks"]) == ("non_finite_validation", [], [1])


def test_manual_optimization_of_shards(seen: Results) -> None:
    """Two optimizers: the faulty updates of one batch are skipped on both ranks."""
    one, other = (result["fsdp2 manual"] for result in seen)
    assert one["records"] == other["records"]
    assert {tuple(record["remedies"]) for record in one["records"]} == {("skip",)}
    assert all(record["ranks"] == [1] for record in one["records"])
    assert (one["error"], one["finite"], other["finite"]) == (None, True, True)


@pytest.mark.parametrize(
    ("fault", "kind", "remedies", "ranks"),
    [
        ("loss", "non_finite_loss", ["skip"], [1]),
        ("gradient", "non_finite_gradient", ["restore"], [1]),
        ("weight", "non_finite_loss", ["restore"], [1]),
        ("moment", "corrupted_state", ["restore"], [1]),
        ("start", "non_finite_loss", ["restore"], []),
    ],
)
def test_sharded_parameters(plain: Results, fault: str, kind: str, remedies: list[str], ranks: list[int]) -> None:
    """``fully_shard``: local shards go back in place, and moments that are made anew are sharded like their weights."""
    one, other = (result["sharded"][fault] for result in plain)
    assert one["records"] == other["records"]
    (record,) = one["records"]
    assert (record["fault"], record["remedies"], record["ranks"]) == (kind, remedies, ranks)
    for result in (one, other):
        assert result["finite"]
        assert result["sharded_moments"]


def test_sharded_gradients_are_clipped_by_the_norm_of_all_shards(plain: Results) -> None:
    """Clipping turned on by the guard limits the norm over all ranks."""
    squares = sum(result["sharded"]["clipped"] for result in plain)
    assert math.sqrt(squares) == pytest.approx(1e-3, rel=1e-3)
