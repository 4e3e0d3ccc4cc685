"""Two processes make a step again together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.again import LEFT_OUT
from tests.distributed.conftest import Launch, Results, launched  # noqa: F401
from tests.distributed.data import AT
from tests.distributed.test_ddp import agreed

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build has no gloo"),
    pytest.mark.timeout(450),
]
RANKS = (0, 1)


@pytest.fixture
def seen(launched: Launch) -> Results:  # noqa: F811
    """What each rank has seen of the suite."""
    return launched("fork", 2, "again")


def record_of(results: Results, name: str) -> dict[str, Any]:
    (record,) = agreed(results, name)["records"]
    return dict(record)


@pytest.mark.parametrize("kind", ["loss", "activation", "raises"])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("accumulated", "at"), [(1, AT), (2, AT - 1), (2, AT)])
def test_a_fault_of_one_rank_that_is_gone(seen: Results, accumulated: int, at: int, rank: int, kind: str) -> None:
    """Weights, moments, buffers, metrics, attributes, random streams and the hooks that callbacks saw are on both ranks
    bit for bit those of a run without the fault, and both have the same record, which names the rank."""
    name = f"{kind} {accumulated} {rank} {at}"
    record = record_of(seen, name)
    assert (record["remedies"], record["cause"], record["ranks"]) == (["redo"], "transient", [rank])
    assert [one[name]["differences"] for one in seen] == [[], []]


@pytest.mark.parametrize("way", ["loss", "raises"])
@pytest.mark.parametrize("rank", RANKS)
def test_a_fault_that_comes_back(seen: Results, rank: int, way: str) -> None:
    """A batch of one rank whose loss is NaN, or that raises, always: skipped on both, as if neither had met it."""
    name = f"{way} always {rank}"
    record = record_of(seen, name)
    assert (record["remedies"], record["ranks"]) == (["skip"], [rank])
    assert agreed(seen, name)["end"] == agreed(seen, "never")["end"]
    assert record["message"].startswith("training_step raised ValueError: Expected value") == (way == "raises")


@pytest.mark.parametrize("rank", RANKS)
def test_an_exception_before_any_batch_is_known_to_be_good(seen: Results, rank: int) -> None:
    """A step that raises in the second update because of its numbers: the batch of the first one shows this."""
    name = f"raises soon {rank}"
    assert (record_of(seen, name)["remedies"], record_of(seen, name)["ranks"]) == (["skip"], [rank])
    assert agreed(seen, name)["end"] == agreed(seen, "never soon")["end"]


@pytest.mark.parametrize("way", ["loss", "raises"])
@pytest.mark.parametrize("bad", LEFT_OUT)
@pytest.mark.parametrize("rank", RANKS)
def test_a_bad_micro_batch_of_one_rank(seen: Results, rank: int, bad: tuple[int, ...], way: str) -> None:
    """The update is the mean over the good micro-batches of all ranks, wherever in the window the bad ones stand."""
    one = agreed(seen, f"{way} {rank} {bad}")
    assert one["end"] == agreed(seen, f"expected {rank} {bad}")["end"]
    told = [(record["remedies"], record["ranks"], record["batch_idx"]) for record in one["records"]]
    assert told == [(["leave out"], [rank], index) for index in bad]


@pytest.mark.parametrize("bad", LEFT_OUT[:2])
def test_a_bad_micro_batch_of_a_step_that_communicates(seen: Results, bad: tuple[int, ...]) -> None:
    """The micro-batch is left out on all ranks, because the others would wait in its collectives; one record names the
    rank at which it was bad."""
    one = agreed(seen, f"together {bad}")
    assert one["end"] == agreed(seen, f"expected together {bad}")["end"]
    told = [(record["remedies"], record["ranks"], record["batch_idx"]) for record in one["records"]]
    assert told == [(["leave out"], [1], index) for index in bad]


def test_a_window_that_is_bad_on_all_ranks(seen: Results) -> None:
    """Nothing is left to make the update from: it is skipped."""
    assert record_of(seen, "all of a window")["remedies"] == ["skip"]
    assert agreed(seen, "all of a window")["end"] == agreed(seen, "never a window")["end"]


@pytest.mark.parametrize("rank", RANKS)
def test_a_gradient_that_one_rank_makes_bad_again(seen: Results, rank: int) -> None:
    """If a repeated step or window gives a gradient that a hook of one rank makes bad, both ranks skip the update
    before it is made, and the record names the rank."""
    for name, twin in ((f"spoils {rank}", "never"), (f"spoils a window {rank}", "never a window")):
        record = record_of(seen, name)
        assert (record["fault"], record["remedies"], record["ranks"]) == ("non_finite_gradient", ["skip"], [rank])
        assert agreed(seen, name)["end"] == agreed(seen, twin)["end"]


@pytest.mark.parametrize("rank", RANKS)
def test_a_weight_that_goes_bad_on_one_rank_in_a_window(seen: Results, rank: int) -> None:
    """No micro-batch is left out, because none is at fault: the state is restored on both ranks."""
    record = record_of(seen, f"weight in a window {rank}")
    assert (record["remedies"], record["cause"]) == (["restore"], "corrupted_state")
    assert agreed(seen, f"weight in a window {rank}")["finite"]


def test_a_late_fault_of_one_rank(seen: Results) -> None:
    """In deferred readback nothing is made again among ranks: the update is undone."""
    assert record_of(seen, "late")["remedies"] == ["restore"]


@pytest.mark.parametrize(
    ("suite", "error"),
    [
        ("mistaken", "ValueError: a mistake of the user's"),
        ("apart", "ValueError: Expected value argument to be within the support"),
    ],
)
def test_an_exception_of_one_rank(launched: Launch, suite: str, error: str) -> None:  # noqa: F811
    """It ends that rank, and the other as without the guard, if numbers have not caused it, or if the other waits in a
    collective that the rank has not reached."""
    errors = [result[suite]["error"] for result in launched("fork", 2, suite)]
    assert errors[1] == error
    assert "Connection closed by peer" in errors[0] or "Connection reset by peer" in errors[0]
