"""Where snapshots lie and how many are kept."""

from __future__ import annotations

import pytest
import torch

from lightning_nanguard.state.device import DeviceMemory
from lightning_nanguard.state.snapshot_room import (
    NOWHERE,
    DevicePeaks,
    Place,
    Room,
    SnapshotSize,
    choose_place,
)
from tests.fake_device import fake_device

CARD = torch.device("cuda", 0)
OTHER = torch.device("cuda", 1)
ONE = SnapshotSize({CARD: 10}, in_host=16)


@pytest.mark.parametrize(
    ("on_device", "in_host", "place"),
    [
        (40, 0, Place(True, 3)),
        (39, 99, Place(True, 2)),
        (20, 99, Place(True, 1)),
        (19, 99, Place(False, 3)),
        (19, 63, Place(False, 2)),
        (0, 32, Place(False, 1)),
        (19, 31, NOWHERE),
        (-5, -5, NOWHERE),
    ],
)
def test_fewer_snapshots_then_the_host_then_none(on_device: int, in_host: int, place: Place) -> None:
    """One is pending beside those that are certified, and in the host each takes what the allocator rounds it up to."""
    assert choose_place(ONE, Room({CARD: on_device}, in_host), 3) == place


def test_every_device_must_have_room() -> None:
    """A model on two devices is kept beside its weights only where both have room."""
    two = SnapshotSize({CARD: 10, OTHER: 30}, in_host=48)
    assert choose_place(two, Room({CARD: 40, OTHER: 120}, 0), 3) == Place(True, 3)
    assert choose_place(two, Room({CARD: 40, OTHER: 59}, 200), 3) == Place(False, 3)


def test_what_the_user_allows_is_what_is_taken() -> None:
    """A limit counts all copies, rounded up where they are pinned; so do parts that ranks keep together."""
    assert choose_place(ONE, Room({CARD: 99}, 99, limit=35), 3) == Place(True, 2)
    assert choose_place(ONE, Room({CARD: 0}, 99, limit=35), 3) == Place(False, 1)
    assert choose_place(ONE, Room({CARD: 0}, 99, limit=31), 3) == NOWHERE
    assert choose_place(ONE, Room({CARD: 25}, 0, parts=2), 3) == Place(True, 3)


def test_on_the_cpu_the_host_alone_counts() -> None:
    """Weights that lie in the host have their snapshots beside them."""
    alone = SnapshotSize({}, in_host=10, at_home=10)
    assert choose_place(alone, Room({}, 30), 3) == Place(True, 2)
    assert choose_place(alone, Room({}, 19), 3) == NOWHERE


def test_the_place_may_be_given() -> None:
    """Whoever wants snapshots in one place gets as many as fit there."""
    room = Room({CARD: 100}, 50)
    assert choose_place(ONE, room, 3, in_host=False) == Place(True, 3)
    assert choose_place(ONE, room, 3, beside=False) == Place(False, 2)


def test_sizes_are_those_of_what_is_taken() -> None:
    """Tensors on a device are rounded up in the host, others are as they are; values take nothing."""
    device, driver = fake_device(devices=2)
    leaves = {"a": torch.zeros(3), "b": torch.zeros(5), "c": torch.zeros(9), "n": 3}
    driver.put(leaves["b"], 1)  # type: ignore[arg-type]
    driver.put(leaves["c"], None)  # type: ignore[arg-type]
    size = SnapshotSize.of(leaves, device)
    assert size == SnapshotSize({CARD: 12, OTHER: 20}, in_host=16 + 32 + 36, at_home=36)
    assert (size.total(beside=True), size.total(beside=False)) == (68, 84)


def test_room_is_what_the_peak_leaves() -> None:
    """What the allocator holds but never used at once is room as well; snapshots in the peak are no need of the run."""
    peaks = DevicePeaks()
    memory = DeviceMemory(total=100, free=10, cached=60, peak=20)
    assert peaks.room(CARD, memory, held=0) == 10 + 60 - 20 - 5
    # Snapshots of 30 made the peak 50; the run itself takes what it took.
    assert peaks.room(CARD, DeviceMemory(100, 10, 60, 50), held=30) == 45
    # A longer sequence takes ten more.
    assert peaks.room(CARD, DeviceMemory(100, 10, 60, 60), held=30) == 35
    # Somebody has reset the count; what was needed once may be needed again.
    assert peaks.room(CARD, DeviceMemory(100, 10, 60, 40), held=30) == 35


def test_a_place_is_told_as_a_number() -> None:
    """The lower one has less room, and each comes back as it was, up to as many snapshots as anybody keeps."""
    places = [NOWHERE, Place(False, 1), Place(False, 63), Place(True, 1), Place(True, 3)]
    codes = [place.code() for place in places]
    assert codes == sorted(codes)
    assert [Place.of_code(code) for code in codes] == places
    assert max(codes) <= 127
    assert Place.of_code(Place(False, 1000).code()) == Place(False, 63)
