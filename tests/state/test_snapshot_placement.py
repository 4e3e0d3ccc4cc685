"""Where snapshots lie, and that they are whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_nanguard.state import snapshot_placement
from lightning_nanguard.state.device import DeviceMemory, OutOfMemory
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.state.ring import Ring
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.state.snapshot_placement import SnapshotPlacement
from lightning_nanguard.state.snapshot_room import Place, SnapshotSize
from tests.fake_device import FakeDriver, GiB, fake_device
from tests.helpers import copied, same_bits
from tests.state.nets import made, train

HOST = torch.device("cpu")
FULL = DeviceMemory(total=80 * GiB, free=0, cached=80 * GiB, peak=79 * GiB)


def on_device(when: Any = "late", **options: Any) -> tuple[Any, Learner, FakeDriver]:
    """A trained network on a fake device, its learner, and the driver."""
    net, optimizer, learner = made("adam")
    learner.device, driver = fake_device(when, **options)
    train(net, optimizer, 2, seed=0)
    return net, learner, driver


def leaves_of(learner: Learner) -> dict[Any, Any]:
    return dict(learner.leaves())


def certify(ring: Ring, snapshot: Snapshot | None) -> Snapshot:
    assert snapshot is not None
    ring.add(snapshot)
    ring.certify()
    return snapshot


@pytest.mark.parametrize("many", [False, True])
def test_without_room_snapshots_go_to_the_host(
    many: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They do from then on, and older ones are dropped but for the newest; among ranks, all of them are moved."""
    _, learner, _ = on_device()
    real, places = snapshot_placement.capture, []

    def capture(*args: Any, **options: Any) -> Snapshot:
        places.append(options["device"])
        if len(places) == 3:
            raise OutOfMemory("no room")
        return real(*args, **options)

    monkeypatch.setattr(snapshot_placement, "capture", capture)
    ring = Ring()
    placement = SnapshotPlacement(learner, ring, alone=not many)
    for step in (1, 2):
        certify(ring, placement.copy(step, step, leaves_of(learner)))
    assert placement.beside
    taken = placement.copy(3, 3, leaves_of(learner))
    assert taken is not None
    taken.wait()
    assert same_bits(taken.leaves, leaves_of(learner))
    assert set(places[:3]) == {None}
    assert set(places[3:]) == {HOST}
    assert placement.where() == HOST
    assert [one.step for one in ring.certified] == ([2, 1] if many else [2])
    assert placement.wanted() == Place(False, 3).code()
    kept = ring.certified[-1]
    kept.wait()
    assert same_bits(kept.leaves, leaves_of(learner))
    weight = kept.leaves[("parameter", "last.weight")]
    assert learner.device.where(weight) is None
    assert kept.homes[("parameter", "last.weight")] == HOST
    assert caplog.text.count("no room for another snapshot at step 3") == 1


def test_snapshots_make_way_when_the_run_needs_more(caplog: pytest.LogCaptureFixture) -> None:
    """Fewer beside the weights, then in the host, then none: each is said once, and nothing comes back."""
    caplog.set_level("INFO", "lightning_nanguard")
    _, learner, driver = on_device()
    (card,) = driver.memories
    one = SnapshotSize.of(leaves_of(learner), learner.device).beside[card]
    ring = Ring()
    placement = SnapshotPlacement(learner, ring, choose=True)
    host = [GiB]
    learner.device.host_memory = lambda: host[0]
    seen = []
    # Bytes the run takes at its peak, beside all snapshots, as room for one copy less each time.
    total, peak = 1000 * one, 0
    for step, spare in enumerate((60, 60, 60, 60, 60, 3.5, 3.5, 3.5, 2.1, 2.1, 0.9, 60)):
        held = sum(snapshot.nbytes() for snapshot in ring.certified)
        peak = int(total * 0.95 - spare * one)
        driver.memories[card] = DeviceMemory(
            total, 0, total, max(peak + held, driver.memories[card].peak % (total + 1))
        )
        placement.look_at_room(leaves_of(learner))
        certify(ring, placement.copy(step, step, leaves_of(learner)))
        seen.append((placement.beside, ring.capacity))
    assert seen == [(True, 3)] * 5 + [(True, 2)] * 3 + [(True, 1)] * 2 + [(False, 1)] * 2
    host[0] = 0
    ring.clear()
    placement.look_at_room(leaves_of(learner))
    assert placement.copy(9, 9, leaves_of(learner)) is None
    assert ring.certified == []
    placement.look_at_room(leaves_of(learner))
    assert caplog.text.count("are kept on the device of the weights") == 2
    assert caplog.text.count("are kept in host memory") == 1
    assert caplog.text.count("so none are kept") == 1


@pytest.mark.parametrize(("sharers", "certified"), [(1, 3), (2, 1), (8, 0)])
def test_processes_share_their_host(sharers: int, certified: int) -> None:
    """What one process may take of the host is its share, after a tenth that is left free; rounding counts."""
    _, learner, driver = on_device(memory=FULL)
    one = SnapshotSize.of(leaves_of(learner), learner.device).in_host
    learner.device.host_memory = lambda: int(5 * one / 0.9)
    ring = Ring()
    placement = SnapshotPlacement(learner, ring, choose=True, sharers=sharers)
    placement.look_at_room(leaves_of(learner))
    assert (placement.beside, placement.is_nowhere()) == (False, certified == 0)
    assert ring.capacity == certified or certified == 0
    assert driver.pinned == []


def test_all_ranks_take_the_place_of_the_one_with_the_least_room() -> None:
    """Their snapshots are the same ones."""
    _, learner, _ = on_device()
    ring = Ring()
    placement = SnapshotPlacement(learner, ring, choose=True, alone=False)
    certify(ring, placement.copy(1, 1, leaves_of(learner)))
    assert placement.wanted() == -1
    placement.hear([-1, Place(False, 2).code()])
    placement.look_at_room(leaves_of(learner))
    placement.hear([placement.wanted(), -1])
    assert (placement.beside, ring.capacity) == (True, 3), "not all have told"
    for _ in range(2):
        placement.hear([placement.wanted(), Place(False, 2).code()])
        assert (placement.beside, ring.capacity) == (False, 2)
    assert ring.certified[0].homes
    placement.hear([placement.wanted(), Place(False, 0).code()])
    assert placement.is_nowhere()
    assert ring.certified == []


def test_the_start_goes_to_the_host_where_it_is_not_negligible() -> None:
    """The first updates may need all of the device; what the peak leaves shows only after them."""
    _, learner, driver = on_device()
    (card,) = driver.memories
    placement = SnapshotPlacement(learner, Ring(), choose=True)
    first = placement.copy(0, 0, leaves_of(learner), beside_run=False)
    assert first is not None
    assert not first.homes
    driver.memories[card] = replace(FULL, total=1000, cached=1000, peak=0)
    second = placement.copy(0, 0, leaves_of(learner), beside_run=False)
    assert second is not None
    assert second.homes
    assert second.check.events == []


def test_other_memory_counts_in_the_limit() -> None:
    """Batches that are kept leave less for snapshots."""
    _, learner, _ = on_device()
    one = SnapshotSize.of(leaves_of(learner), learner.device).total(beside=True)
    ring = Ring()
    placement = SnapshotPlacement(learner, ring, limit=4.5 * one, others=lambda: one)
    placement.look_at_room(leaves_of(learner))
    assert ring.capacity == 2


@pytest.mark.parametrize("when", ["late", "at once", "random"])
def test_a_snapshot_in_the_host_is_the_state_of_its_update(when: Any) -> None:
    """Weights and moments go beside the run, buffers before it goes on; the next update waits, and changes nothing."""
    net, learner, driver = on_device(when)
    placement = SnapshotPlacement(learner, Ring(), HOST)
    expected = copied(leaves_of(learner))
    taken = placement.copy(1, 1, leaves_of(learner))
    assert taken is not None
    net(torch.randn(4, 4))  # forward writes to statistics
    placement.settle()
    train(net, learner.optimizers[0], 1, seed=1)
    driver.finish()
    assert taken.intact()
    assert same_bits(taken.leaves, expected)
    assert taken.check.events, "some of it was copied beside the run"


def test_a_torn_snapshot_is_known_and_the_next_is_not_copied_beside_the_run() -> None:
    """Who has written to weights between updates once does so again."""
    net, learner, driver = on_device()
    placement = SnapshotPlacement(learner, Ring(), HOST)
    taken = placement.copy(1, 1, leaves_of(learner))
    assert taken is not None
    net.last.weight.data.mul_(0.5)
    driver.finish()
    assert not taken.intact()
    placement.torn()
    again = placement.copy(2, 2, leaves_of(learner))
    assert again is not None
    expected = copied(leaves_of(learner))
    net.last.weight.data.mul_(0.5)
    driver.finish()
    assert again.intact()
    assert same_bits(again.leaves, expected)


def waiting(placement: SnapshotPlacement, leaves: Mapping[Any, Any]) -> set[Any]:
    return {key for key, leaf in leaves.items() if placement._can_wait(key, leaf)}


def test_a_frozen_tensor_is_copied_beside_the_run_once_it_was_seen_to_stay() -> None:
    """Buffers, averages and a teacher are written to before the next update, weights are not."""
    _, learner, _ = on_device()
    placement = SnapshotPlacement(learner, Ring(), HOST)
    leaves = {**leaves_of(learner), ("average", "EMA", "w"): torch.zeros(3)}
    frozen = ("parameter", "frozen")
    assert {key[0] for key in waiting(placement, leaves)} == {"parameter", "optimizer"}
    assert frozen not in waiting(placement, leaves)
    placement.unchanged = {frozen}
    assert frozen in waiting(placement, leaves)


def test_a_card_without_room_for_a_side_copy_copies_on_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshot is taken all the same, and is whole."""
    net, learner, driver = on_device()
    placement = SnapshotPlacement(learner, Ring(), HOST)

    def full(*args: Any) -> Any:
        raise OutOfMemory("no room for the staging memory")

    monkeypatch.setattr(placement._side_copy, "_staging_on", full, raising=False)
    expected = copied(leaves_of(learner))
    for _ in range(2):
        taken = placement.copy(1, 1, leaves_of(learner))
        assert taken is not None
        net.last.weight.data.mul_(1.0)
        driver.finish()
        assert taken.intact()
        assert same_bits(taken.leaves, expected)


def test_a_peak_that_grows_between_snapshots_is_seen() -> None:
    """Snapshots may be thousands of updates apart; the first validation is not."""
    _, learner, driver = on_device()
    (card,) = driver.memories
    ring = Ring()
    placement = SnapshotPlacement(learner, ring, choose=True)
    placement.look_at_room(leaves_of(learner))
    certify(ring, placement.copy(1, 1, leaves_of(learner)))
    driver.memories[card] = FULL
    for _ in range(63):
        placement.settle()
    assert placement.beside
    placement.settle()
    assert not placement.beside
    (kept,) = ring.certified
    kept.wait()
    assert same_bits(kept.leaves, leaves_of(learner))
