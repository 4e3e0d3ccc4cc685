"""The group of ranks: what travels between two processes, in a loop of plain PyTorch."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist

from lightning_nanguard.distributed.group import Group
from tests.distributed.conftest import Launch, Results

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build has no gloo"),
    pytest.mark.timeout(450),  # the first test waits for all ranks
]


@pytest.fixture
def seen(launched: Launch) -> Results:
    """What two ranks saw."""
    return launched("fork", 2, "plain")


@pytest.mark.parametrize("place", ["one node", "nodes"])
def test_a_group_brings_values_from_rank_to_rank(seen: Results, place: str) -> None:
    """Reports arrive bit by bit, NaN and signed zeros included, also those that are read late; values that are gathered
    and tensors that are averaged are the same on all ranks."""
    for result in seen:
        found = result["group"][place]
        assert found["gathered"] == [[0, None, ""], [1, None, "é"]]
        assert found["last"] == [one["group"][place]["mine"] for one in seen]
        assert found["first"] == [0, 0]
        assert found["average"] == [0.5] * 5


@pytest.mark.parametrize("place", ["one node", "nodes"])
def test_a_rank_that_has_left_is_on_its_own(seen: Results, place: str) -> None:
    """It waits for nobody: it gathers its own value only, and refuses to join a snapshot that was split."""
    for rank, result in enumerate(seen):
        found = result["group"][place]
        assert found["alone"] == [rank]
        assert found["refused"].startswith("the last good state is split among ranks, and this rank can no longer")


def test_a_rank_waits_for_nobody(seen: Results) -> None:
    """In a healthy update a rank ends, decisions and all, before the others have told of theirs; also with shards."""
    one, other = (result["waits"] for result in seen)
    assert one == other
    assert (one["steps"], one["records"], one["shards"]) == (6, 0, [6, 0])


def test_no_collective_in_a_healthy_update(seen: Results) -> None:
    """On one machine, or with shards, the collectives are those of the loop alone; among machines there is one more for
    each update, which no profile of the user's holds, since torch may crash where a profile ends before it."""
    for result in seen:
        collectives = result["collectives"]
        assert collectives["one node, started"] == collectives["of the loop"]
        assert collectives["nodes, started"] == collectives["of the loop"] + collectives["updates"]
        assert collectives["one node, profiled"] == collectives["nodes, profiled"] == collectives["of the loop"]
        assert collectives["shards"] == collectives["of the sharded loop"] > 0


def test_ranks_of_a_node_share_snapshots(seen: Results) -> None:
    """Each of two ranks keeps half of a snapshot, a rank alone on its node all of it; both come back bit by bit."""
    for result in seen:
        memory = result["memory"]
        shared, alone = memory["one node"], memory["nodes"]
        assert all(shared["restored"])
        assert all(alone["restored"])
        assert alone["kept"][0] == alone["whole"]
        assert shared["kept"][0] == pytest.approx(shared["whole"] / 2, rel=0.01)


def test_a_default_device_is_no_place_for_what_ranks_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo works in host memory, wherever ``torch.set_default_device`` puts the user's tensors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for name, value in {**address, "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo")
    try:
        with torch.device("meta"):
            group = Group()
            assert group.gather(["a", 1, None]) == [["a", 1, None]]
            group.close()
    finally:
        dist.destroy_process_group()


def test_ranks_are_forked_with_everything_imported(seen: Results) -> None:
    """Else each rank of each suite imports torch and Lightning anew, which takes seconds."""
    assert [one["preloaded"] for one in seen] == [True, True]
