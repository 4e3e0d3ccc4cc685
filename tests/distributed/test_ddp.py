"""Several gloo processes on the CPU: the same decision, remedy, state and record on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tests.distributed.conftest import Launch, Results
from tests.distributed.worker import AT

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build has no gloo")


def agreed(results: Results, name: str) -> Mapping[str, Any]:
    """What all ranks saw of one fit, once it is certain that they saw the same and ended with the same bits."""
    one = results[0][name]
    for other in results[1:]:
        for key in ("records", "after", "end", "lr_multiplier", "steps", "error"):
            assert other[name][key] == one[key], f"{name}: {key}"
    return one


LAUNCHES = [("script", 2), ("torchrun", 3)]
RANKS = [(how, world, rank) for how, world in LAUNCHES for rank in range(world)]
FAULTS = {
    # What: fault, remedies, within how many updates, whether the rank is told.
    "sample": ("non_finite_loss", ["skip"], 0, True),
    "loss": ("non_finite_loss", ["skip"], 0, True),
    "infinite": ("non_finite_loss", ["skip"], 0, True),
    "spike": ("gradient_spike", ["skip"], 0, True),
    "norm": ("non_finite_loss", ["skip"], 0, True),
    "gradient": ("non_finite_gradient", ["restore"], 1, True),
    "weight": ("non_finite_loss", ["restore"], 0, True),
    "flip": ("parted_ranks", ["restore"], 6, False),
    "moment": ("corrupted_state", ["restore"], 6, True),
    "buffer": ("corrupted_state", ["restore"], 6, True),
}


@pytest.mark.parametrize(("how", "world"), LAUNCHES)
def test_a_healthy_run_is_the_same(launched: Launch, how: str, world: int) -> None:
    """Every bit of weights and moments is as without the guard, and nothing is on record."""
    results = launched(how, world, "faults")
    healthy = agreed(results, "healthy")
    assert healthy["end"] == agreed(results, "bare")["end"]
    assert healthy["records"] == []


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("how", "world", "rank"), RANKS)
def test_one_ranks_fault_leads_all_to_the_same(launched: Launch, how: str, world: int, rank: int, fault: str) -> None:
    """Same decision, remedy, record and multiplier at the same step, bit-identical weights, and the rank is named."""
    results = launched(how, world, "faults")
    seen = agreed(results, f"{fault} {rank}")
    kind, remedies, within, named = FAULTS[fault]
    (record,) = seen["records"]
    assert (record["fault"], record["remedies"]) == (kind, remedies)
    assert 0 <= record["batch_idx"] - AT <= within
    assert record["ranks"] == ([rank] if named or world > 2 else [])
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
def test_a_micro_batch_under_no_sync(launched: Launch, how: str, world: int, rank: int) -> None:
    """A fault in a micro-batch whose gradients are not yet synchronised is skipped with its window on all ranks."""
    seen = agreed(launched(how, world, "faults"), f"accumulated {rank}")
    (record,) = seen["records"]
    assert (record["fault"], record["remedies"], record["ranks"]) == ("non_finite_loss", ["skip"], [rank])
    assert seen["steps"] == math.ceil(seen["batches"] / 2)
