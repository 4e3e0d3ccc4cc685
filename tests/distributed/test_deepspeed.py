"""DeepSpeed's ZeRO in whole Trainer runs, two gloo processes and one, on the CPU."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tests.distributed.conftest import Launch, Results
from tests.distributed.data import AT, STEPS
from tests.distributed.test_sharded import FAULTS as SHARDED
from tests.distributed.zero import AMONG, KINDS

pytestmark = [
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed: see the Makefile"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build has no gloo"),
    pytest.mark.timeout(450),  # the first test of a suite waits for all its ranks
]

FAULTS = {**SHARDED, "partition": ("non_finite_loss", ["restore"], 1)}


@pytest.fixture
def seen(launched: Launch) -> Results:
    """What two ranks saw in all stages."""
    return launched("fork", 2, "zero")


@pytest.fixture
def alone(launched: Launch) -> dict[str, Any]:
    """What one process saw in all stages."""
    (result,) = launched("fork", 1, "zero_alone")
    return result


@pytest.mark.parametrize("kind", AMONG)
def test_a_healthy_run_in_partitions_is_the_same(seen: Results, kind: str) -> None:
    """Every bit of each rank's parameters, partitions and moments is as without the guard."""
    for result in seen:
        assert result[f"{kind}: healthy"]["end"] == result[f"{kind}: bare"]["end"]
        assert result[f"{kind}: healthy"]["records"] == []


@pytest.mark.parametrize(("kind", "place"), [(kind, place) for kind, places in AMONG.items() for place in places])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_ranks_fault_in_partitions(seen: Results, kind: str, place: str, rank: int) -> None:
    """Both ranks do the same; what is left is what a run leaves that never saw the batch, or none of those since the
    snapshot, bit by bit."""
    fault, remedies, within = FAULTS[place]
    one, other = (result[f"{kind}: {place} {rank}"] for result in seen)
    assert one["records"] == other["records"]
    (record,) = one["records"]
    assert (record["fault"], record["remedies"]) == (fault, remedies)
    # A bad partition is gathered by all.
    assert record["ranks"] == [rank] or (place == "partition" and record["ranks"] == [])
    for result in seen:
        mine = result[f"{kind}: {place} {rank}"]
        assert (mine["error"], mine["finite"]) == (None, True)
        (acted_in,) = mine["acted_in"]
        assert 0 <= acted_in - AT <= within
        step = record["snapshot_step"]
        left_out = "without" if remedies == ["skip"] else f"without {step} to {acted_in}"
        assert mine["end"] == result[f"{kind}: {left_out}"]["end"]
        if remedies == ["restore"]:
            assert mine["after"] == [mine["by_step"][str(step)]]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_a_sample_is_named_in_partitions(seen: Results, kind: str, rank: int) -> None:
    """Rank 0 writes the cause that another rank's batch shows."""
    (record,) = seen[0][f"{kind}: sample {rank}"]["records"]
    assert (record["cause"], record["finding"]["samples"]) == ("non_finite_input", [1])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", AMONG)
def test_a_micro_batch_that_deepspeed_accumulates(seen: Results, kind: str, rank: int) -> None:
    """It is skipped with its window, bit by bit."""
    for result in seen:
        mine = result[f"{kind}: accumulated {rank}"]
        assert [record["remedies"] for record in mine["records"]] == [["skip"]]
        assert mine["end"] == result[f"{kind}: without window"]["end"]


def test_a_diverging_run_in_partitions(seen: Results) -> None:
    """Both go back, clip by the norm of all partitions and cut the rate alike, and what is left is finite."""
    one, other = (result["zero3: diverged"] for result in seen)
    assert one["records"] == other["records"]
    assert one["records"][0]["remedies"] == ["restore", "clip", "scale"]
    assert one["lr_multiplier"] == other["lr_multiplier"] < 1
    assert (one["error"], one["finite"], other["finite"]) == (None, True, True)


def test_partitioned_gradients_are_clipped(seen: Results, alone: dict[str, Any]) -> None:
    """By the norm over all ranks: the one that DeepSpeed then finds is the value clipped to."""
    found = [("zero3", result) for result in seen] + [(kind, alone) for kind in KINDS]
    for kind, result in found:
        norms = result[f"{kind}: clipped"]["norms"]
        assert len(norms) == STEPS
        tolerance = 1e-4 if KINDS[kind][1] == "32-true" else 1e-2
        assert all(math.isclose(norm, 1e-2, rel_tol=tolerance) for norm in norms)


@pytest.mark.parametrize("place", ["loss", "gradient", "weight"])
def test_late_reading_of_partitions(seen: Results, place: str) -> None:
    """In deferred readback both go back together, bit by bit, and the record is of the faulty batch."""
    for result in seen:
        mine = result[f"zero3: deferred {place}"]
        assert mine["records"] == seen[0][f"zero3: deferred {place}"]["records"]
        (record,) = mine["records"]
        assert (record["batch_idx"], record["remedies"]) == (AT, ["restore"])
        assert mine["after"] == [mine["by_step"][str(record["snapshot_step"])]]
        assert mine["finite"]


def test_observing_partitions(seen: Results) -> None:
    """With observe=True both record what they would have done, and neither does anything."""
    one, other = (result["zero3: observed"] for result in seen)
    assert one["records"] == other["records"]
    assert one["records"][0]["remedies"] == ["skip"]
    assert not any(record["applied"] for record in one["records"])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", AMONG)
def test_no_poisoned_partition(seen: Results, kind: str, rank: int) -> None:
    """A weight lost on one rank right before a save: every folder is there and good, the last good one too, and both
    ranks went back together."""
    one, other = (result[f"{kind}: saved {rank}"] for result in seen)
    assert (one["error"], other["error"]) == (None, None)
    assert (one["files"], one["bad"], one["kept"]) == (2, [], True)
    assert one["records"] == other["records"]
    assert [(record["remedies"], record["ranks"]) for record in one["records"]] == [(["restore"], [rank])]


@pytest.mark.parametrize("way", ["within", "within, directly"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_save_of_partitions_within_a_batch(seen: Results, alone: dict[str, Any], kind: str, way: str) -> None:
    """The last good partitions are written, by one process or two, through the trainer or the strategy, and the run is
    helped at the end of the batch."""
    for result in [alone, *(seen if kind == "zero3" else [])]:
        mine = result[f"{kind}: {way}"]
        assert (mine["saved"], mine["finite"], mine["error"]) == (True, True, None)
        assert [record["remedies"] for record in mine["records"]] == [["rewrite"], ["restore"]]


@pytest.mark.parametrize("source", ["resumed", "from last good"])
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_a_run_in_partitions_goes_on(seen: Results, kind: str, source: str) -> None:
    """From a checkpoint of the guard, and from its last good one, a run goes on to the bits that it ends with without
    the guard."""
    for result in seen:
        resumed = result[f"{kind}: {source}"]
        assert (resumed["error"], resumed["finite"], resumed["records"]) == (None, True, [])
        assert resumed["steps"] == (2 * STEPS if source == "resumed" else STEPS)
        assert resumed["end"] == result[f"{kind}: {source} bare"]["end"]


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_a_poisoned_partition_is_refused(seen: Results, kind: str) -> None:
    """What a run without the guard has lost is not gone on from."""
    told = "TrainingDivergedError: parameter"
    assert all(result[f"{kind}: refused"]["error"].startswith(told) for result in seen)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("done", "same", "remedies"),
    [
        ("healthy", "bare", []),
        ("loss", "without", [["skip"]]),
        ("weight", "without all", [["restore"]]),
        ("slowed", "slow", [["skip"]]),
        ("manual", "manual without", [["skip"]]),
        ("looking ahead", "looking ahead without", [["skip"]]),
    ],
)
def test_one_process_of_deepspeed(
    alone: dict[str, Any], kind: str, done: str, same: str, remedies: list[list[str]]
) -> None:
    """Bit by bit: a healthy run, a skip, a rollback to the start without moments, a multiplier on the rates of two
    groups, a skip under manual optimization, and one with an optimizer that moves weights without gradients."""
    mine = alone[f"{kind}: {done}"]
    assert (mine["error"], mine["finite"]) == (None, True)
    assert [record["remedies"] for record in mine["records"]] == remedies
    assert mine["end"] == alone[f"{kind}: {same}"]["end"]


def test_no_collective_in_a_healthy_update_of_partitions(seen: Results) -> None:
    """A trace of a run's updates holds as many with the guard as without."""
    for result in seen:
        one, other = (result[f"zero3: {name}"]["collectives"] for name in ("healthy", "bare"))
        assert one == other > 0


def test_late_reading_looks_at_the_batch_of_partitions(seen: Results) -> None:
    """Corrupt samples that are read late are found in the batch of the update that is over, and no rate is cut."""
    for result in seen:
        mine = result["zero3: deferred samples"]
        told = [(record["batch_idx"], record["remedies"], record["cause"]) for record in mine["records"]]
        skipped = [(index, ["skip"], "non_finite_input") for index in (19, 23, 27)]
        assert told == [(15, ["restore"], "non_finite_input"), *skipped]
        assert mine["lr_multiplier"] == 1.0


def test_one_ranks_validation_loss_with_partitions(seen: Results) -> None:
    """It is on record with the next update, and nothing is changed; a NaN metric counts as no fault."""
    for result in seen:
        assert result["zero3: validation"]["error"] is None
        (record,) = result["zero3: validation"]["records"]
        assert (record["fault"], record["remedies"], record["ranks"]) == ("non_finite_validation", [], [1])
