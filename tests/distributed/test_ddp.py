"""Several gloo processes on the CPU: the same decision, remedy, state and record on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tests.distributed.conftest import Launch, Results
from tests.distributed.data import AT

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build has no gloo"),
    pytest.mark.timeout(450),  # the first test of a suite waits for all its ranks
]


def agreed(results: Results, name: str) -> Mapping[str, Any]:
    """What all ranks saw of one fit, once it is certain that they saw the same and ended with the same bits."""
    one = results[0][name]
    for other in results[1:]:
        for key in ("records", "after", "end", "lr_multiplier", "steps", "error"):
            assert other[name][key] == one[key], f"{name}: {key}"
    return one


# Two ranks of one machine, three of one machine, and three told that they are of two (`main` in worker.py).
LAUNCHES = [("script", 2), ("spawn", 3), ("torchrun", 3)]
RANKS = [(how, world, rank) for how, world in LAUNCHES for rank in range(world)]
NEVER = 99
FAULTS = {
    # What: fault, remedies, within how many updates, among how many ranks the one at fault can be told.
    "sample": ("non_finite_loss", ["skip"], 0, 2),
    "loss": ("non_finite_loss", ["skip"], 0, 2),
    "infinite": ("non_finite_loss", ["skip"], 0, 2),
    "spike": ("gradient_spike", ["skip"], 0, 2),
    "proportion": ("gradient_spike", ["skip"], 0, 2),
    "norm": ("non_finite_loss", ["skip"], 0, 2),
    "accumulated loss": ("non_finite_loss", ["leave out"], -1, 2),
    "accumulated gradient": ("non_finite_gradient", ["redo"], 0, NEVER),
    "gradient": ("non_finite_gradient", ["restore"], 1, 2),
    "weight": ("non_finite_loss", ["restore"], 0, 2),
    "flip": ("parted_ranks", ["restore"], 6, 3),
    "moment": ("corrupted_state", ["restore"], 6, 2),
    "buffer": ("corrupted_state", ["restore"], 6, 2),
}


@pytest.mark.parametrize(("how", "world"), LAUNCHES)
def test_a_healthy_run_is_the_same(launched: Launch, how: str, world: int) -> None:
    """Every bit of weights and moments is as without the guard, and nothing is on record."""
    results = launched(how, world, "faults")
    healthy = agreed(results, "healthy")
    assert healthy["end"] == agreed(results, "bare")["end"]
    assert healthy["records"] == []


def test_ranks_of_one_machine_share_snapshots(launched: Launch) -> None:
    """Each of two ranks of a machine keeps half of a snapshot; the rank of the other machine keeps all of it."""
    assert [one["snapshot_parts"] for one in launched("torchrun", 3, "faults")] == [2, 2, 1]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("how", "world", "rank"), RANKS)
def test_one_ranks_fault_leads_all_to_the_same(launched: Launch, how: str, world: int, rank: int, fault: str) -> None:
    """Same decision, remedy, record and multiplier at the same step, bit-identical weights, and the rank is named."""
    results = launched(how, world, "faults")
    seen = agreed(results, f"{fault} {rank}")
    kind, remedies, within, told_among = FAULTS[fault]
    (record,) = seen["records"]
    assert (record["fault"], record["remedies"]) == (kind, remedies)
    assert min(0, within) <= record["batch_idx"] - AT <= within
    assert record["ranks"] == ([rank] if world >= told_among else [])
    assert len(seen["after"]) == 1
    assert seen["error"] is None
    assert all(result[f"{fault} {rank}"]["finite"] for result in results)


@pytest.mark.parametrize(("how", "world", "rank"), RANKS)
def test_a_skip_is_bitwise(launched: Launch, how: str, world: int, rank: int) -> None:
    """A corrupt sample on one rank: afterwards all are as if no rank had met that batch."""
    results = launched(how, world, "faults")
    assert agreed(results, f"sample {rank}")["end"] == agreed(results, "without")["end"]


@pytest.mark.parametrize(("how", "world", "rank"), RANKS)
def test_a_sample_is_named_with_its_rank(launched: Launch, how: str, world: int, rank: int) -> None:
    """Rank 0 writes the cause that another rank's batch shows."""
    (record,) = agreed(launched(how, world, "faults"), f"sample {rank}")["records"]
    assert record["cause"] == "non_finite_input"
    assert record["finding"]["samples"] == [1]


@pytest.mark.parametrize(("how", "world", "rank"), RANKS)
def test_a_gradient_that_is_bad_once_under_no_sync(launched: Launch, how: str, world: int, rank: int) -> None:
    """A gradient that goes bad once, before it is synchronised: all are as if it had not."""
    results = launched(how, world, "faults")
    seen = agreed(results, f"accumulated gradient {rank}")
    assert seen["end"] == agreed(results, "window")["end"]
    assert seen["steps"] == math.ceil(seen["batches"] / 2)


@pytest.mark.parametrize("fault", [name for name, (_, remedies, _, _) in FAULTS.items() if remedies == ["restore"]])
@pytest.mark.parametrize(("how", "world", "rank"), RANKS)
def test_a_rollback_is_bitwise(launched: Launch, how: str, world: int, rank: int, fault: str) -> None:
    """Parameters and moments are what they were at the step gone back to, though each rank kept only its part."""
    seen = agreed(launched(how, world, "faults"), f"{fault} {rank}")
    (record,) = seen["records"]
    assert seen["after"] == [seen["by_step"][str(record["snapshot_step"])]]


@pytest.fixture
def seen(launched: Launch) -> Results:
    """What two ranks saw of everything but single faults."""
    return launched("fork", 2, "behaviour")


def test_a_shared_snapshot_is_put_together_bitwise(seen: Results) -> None:
    """A rollback gathers a snapshot of which each rank holds a part, and the weights are those of its step."""
    one = agreed(seen, "shared")
    (record,) = one["records"]
    assert one["after"] == [one["by_step"][str(record["snapshot_step"])]]


def test_a_rollback_to_the_start_is_bitwise(seen: Results) -> None:
    """Moments, which were not there, are made anew: the run ends as one that never saw the batches since."""
    one = agreed(seen, "to the start")
    assert [(record["remedies"], record["snapshot_step"]) for record in one["records"]] == [(["restore"], 0)]
    assert one["end"] == agreed(seen, "from the start")["end"]


def test_a_poisoned_checkpoint_is_refused_on_all_ranks(seen: Results) -> None:
    """What a run without the guard has lost is not gone on from, and every rank says so."""
    assert all(result["refused"]["error"].startswith("BadCheckpointError") for result in seen)


def test_ranks_rehearse_a_rate_together(seen: Results) -> None:
    """A rate that is too high is found by rehearsals on the batches of all ranks, to the same multiplier."""
    one = agreed(seen, "diverged")
    assert one["records"][0]["remedies"] == ["restore", "clip", "scale"]
    assert one["lr_multiplier"] < 0.5
    assert one["finite"]


def test_one_ranks_validation_loss(seen: Results) -> None:
    """A validation loss that is not finite on one rank is on record with the next update, and nothing is changed. A NaN
    metric, logged in each epoch, neither hangs nor counts as a fault."""
    one = agreed(seen, "validation")
    assert one["error"] is None
    (record,) = one["records"]
    assert (record["fault"], record["remedies"], record["ranks"]) == ("non_finite_validation", [], [1])


def test_observing_ranks_change_nothing(seen: Results) -> None:
    """With observe=True all record what they would have done, and no rank does anything."""
    one = agreed(seen, "observed")
    assert one["records"][0]["remedies"] == ["skip"]
    assert not any(record["applied"] for record in one["records"])
    assert not one["finite"]


def test_manual_optimization(seen: Results) -> None:
    """Two optimizers: the faulty updates of one batch are skipped on both ranks."""
    one = agreed(seen, "manual")
    assert {tuple(record["remedies"]) for record in one["records"]} == {("skip",)}
    assert all(record["ranks"] == [1] for record in one["records"])
    assert one["finite"]


@pytest.mark.parametrize("fault", ["loss", "gradient", "weight"])
def test_late_reading(seen: Results, fault: str) -> None:
    """In deferred readback all ranks go back together, and the record is of the faulty batch."""
    (record,) = agreed(seen, f"deferred {fault}")["records"]
    assert (record["batch_idx"], record["remedies"], record["ranks"]) == (AT, ["restore"], [1])
    assert all(result[f"deferred {fault}"]["finite"] for result in seen)


def test_late_reading_of_one_ranks_statistics(seen: Results) -> None:
    """Statistics that one rank's batch spoils, where only that rank sees it: all go back, and read late together."""
    (record,) = agreed(seen, "deferred statistics")["records"]
    assert (record["fault"], record["remedies"], record["ranks"]) == ("implausible_state", ["restore"], [1])
    assert all(result["deferred statistics"]["steps"] == 160 for result in seen)


def test_late_reading_looks_at_the_batch(seen: Results) -> None:
    """Corrupt samples that are read late lie with the data of one rank: all go back, and no rate is cut. From then on
    all read each update before it is made."""
    one = agreed(seen, "deferred samples")
    told = [(record["batch_idx"], record["remedies"], record["ranks"], record["cause"]) for record in one["records"]]
    words = [(15, ["restore"]), *((index, ["skip"]) for index in (19, 23, 27, 31))]
    assert told == [(index, remedies, [1], "non_finite_input") for index, remedies in words]
    assert all(record["finding"]["samples"] == [1] for record in one["records"])
    assert one["lr_multiplier"] == 1.0


def test_late_reading_with_an_optimizer_that_skips(seen: Results) -> None:
    """Fused optimizers hold the update back on every rank, so that nothing has to be undone."""
    (record,) = agreed(seen, "deferred fused")["records"]
    assert (record["remedies"], record["ranks"]) == (["skip"], [1])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_with_one_ranks_weight_gone_bad(seen: Results, rank: int) -> None:
    """What rank 0 writes is finite, whichever rank's weight went bad just before, in mid-batch."""
    assert seen[0][f"saved {rank}"]["saved"]
    assert all(result[f"saved {rank}"]["finite"] for result in seen)
    assert seen[0][f"saved {rank}"]["end"] == seen[1][f"saved {rank}"]["end"]


@pytest.mark.parametrize("suite", ["raising", "uneven"])
def test_a_rank_that_is_left_alone_ends(launched: Launch, suite: str) -> None:
    """Where a rank raises or runs out of data the others fail as they do without the guard, and nobody waits."""
    errors = [result[suite]["error"] for result in launched("fork", 2, suite)]
    alone = {"raising": "RuntimeError: one rank is out of luck", "uneven": None}[suite]
    assert errors[1] == alone
    assert "Connection closed by peer" in errors[0] or "Connection reset by peer" in errors[0]


@pytest.mark.parametrize("name", ["rate lost", "rate lost for a while"])
def test_one_ranks_learning_rate(seen: Results, name: str) -> None:
    """A learning rate that becomes NaN on one rank: this rank uses the rate of the other one, so the run is bit for bit
    the same, and both ranks have one record, which names the rank."""
    (record,) = agreed(seen, name)["records"]
    assert (record["fault"], record["remedies"], record["ranks"]) == ("invalid_learning_rate", ["hold rate"], [1])
    assert (record["global_step"], record["batch_idx"]) == (AT + 1, AT)
    assert agreed(seen, name)["end"] == agreed(seen, "rate as it was")["end"]


def test_one_ranks_learning_rate_from_the_start(seen: Results) -> None:
    """A rate that is NaN on one rank in the first update: this rank uses the rate from before it; the ranks agree."""
    (record,) = agreed(seen, "rate lost from the start")["records"]
    assert (record["fault"], record["remedies"], record["ranks"]) == ("invalid_learning_rate", ["hold rate"], [1])
    assert (record["global_step"], record["batch_idx"]) == (1, 0)


def test_one_ranks_falling_learning_rate(seen: Results) -> None:
    """If the ranks have made an update at different rates, both go back, and then make all updates at the same rate."""
    one, other = (result["falling rate lost"] for result in seen)
    assert all(one[key] == other[key] for key in ("records", "end", "steps", "error"))
    first, second = one["records"]
    assert (first["fault"], first["remedies"], first["ranks"]) == ("invalid_learning_rate", ["hold rate"], [1])
    assert (second["fault"], second["remedies"]) == ("parted_ranks", ["restore"])
    assert one["finite"]
    assert one["error"] is None
