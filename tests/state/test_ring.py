"""The ring: which snapshots are kept."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from lightning_nanguard.state.ring import Ring
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.thresholds.snapshots import RingThresholds
from lightning_nanguard.types import Evidence, Trial


def snapshot_at(step: int, level: float | None) -> Snapshot:
    return Snapshot(step, step, {}, level=level)


def ring_of(levels: list[float], capacity: int = 3, *, keep_oldest: bool = False) -> Ring:
    ring = Ring(capacity)
    for step, level in enumerate(levels):
        ring.add(snapshot_at(step, level))
        assert not ring.healthy(step)  # measured before this state was
        assert not ring.healthy(step + 1)
        assert ring.healthy(step + 2)
        ring.certify(loss_unit=1.0, keep_oldest=keep_oldest)
    return ring


def steps_of(ring: Ring) -> list[int]:
    return [snapshot.step for snapshot in ring.certified]


def test_the_newest_are_kept_while_the_loss_falls() -> None:
    """A ring of three keeps the three newest, newest first, unless it is told to keep the start."""
    falling = [5.0, 4.0, 3.0, 2.0, 1.0]
    assert steps_of(ring_of(falling)) == [4, 3, 2]
    assert steps_of(ring_of(falling, keep_oldest=True)) == [4, 3, 0]


def test_the_best_is_kept_while_the_loss_rises() -> None:
    """A fault found late needs the state from before it began: the oldest stays while nothing newer is better."""
    assert steps_of(ring_of([1.0, 2.0, 3.0, 4.0, 5.0])) == [4, 3, 0]


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.integers(1, 5))
def test_a_ring_is_bounded_and_ordered(levels: list[float], capacity: int) -> None:
    """Never more than its capacity, the newest always there, newest first."""
    steps = steps_of(ring_of(levels, capacity))
    assert len(steps) <= capacity
    assert steps == sorted(steps, reverse=True)
    assert steps[0] == len(levels) - 1


def test_names_of_single_snapshots() -> None:
    """The last certified one, and the latest of all, which is the pending one if there is one."""
    ring = Ring()
    assert (ring.last_certified, ring.latest, ring.all()) == (None, None, [])
    ring = ring_of([3.0, 2.0])
    newer, older = ring.certified
    assert (ring.last_certified, ring.latest, ring.all()) == (newer, newer, [newer, older])
    pending = snapshot_at(2, None)
    ring.add(pending)
    assert (ring.last_certified, ring.latest, ring.all()) == (newer, pending, [newer, older, pending])


def test_a_pending_snapshot_under_suspicion_goes() -> None:
    """What is dropped is neither pending nor certified, and its memory is used again, once."""
    ring = Ring()
    one = snapshot_at(0, 1.0)
    ring.add(one)
    ring.drop_pending()
    assert ring.pending is None
    assert ring.spare() is one
    assert ring.spare() is None


def test_the_snapshot_to_compare_with() -> None:
    """It is the newest whose loss was about the best, and after a trial that goes on from the start the oldest."""
    ring = ring_of([1.0, 1.05, 3.0])
    assert ring.good(1.0) is ring.certified[1]
    assert ring.good(0.1) is ring.certified[2]
    assert Ring().good(1.0) is None
    for trial, depth in ((None, 1), (Trial(0.6, "best"), 1), (Trial(0.6, "start"), 2)):
        assert ring.good_for(Evidence(step=9, trial=trial)) is ring.certified[depth]
    assert Ring().good_for(Evidence(step=9, trial=Trial())) is None


def test_going_back_drops_what_is_newer() -> None:
    """The depth is bounded by what there is; the snapshot gone back to is then the newest."""
    ring = ring_of([3.0, 2.0, 1.0])
    assert ring.discard_newer(1).step == 1
    assert ring.discard_newer(9).step == 0
    assert steps_of(ring) == [0]


def test_memory_is_let_go_of() -> None:
    """Without room only the newest certified snapshot stays, or as many as fit from then on; at the end none is."""
    ring = ring_of([3.0, 2.0, 1.0])
    ring.add(snapshot_at(9, 1.0))
    ring.shed()
    assert (steps_of(ring), ring.pending, ring.spare(), ring.capacity) == ([2], None, None, 3)
    ring = ring_of([3.0, 2.0, 1.0])
    ring.shrink(2)
    assert (steps_of(ring), ring.spare(), ring.capacity) == ([2, 1], None, 2)
    ring.clear()
    assert ring.certified == []


def test_thresholds_are_given() -> None:
    """How long a snapshot waits, and what counts as about the best, can be set."""
    ring = Ring(thresholds=replace(RingThresholds(), certify_after=1, about_best=2.0))
    for step, level in enumerate([1.0, 3.0]):
        ring.add(snapshot_at(step, level))
        assert ring.healthy(step + 1)
        ring.certify(loss_unit=1.0)
    assert ring.certify_after == 1
    assert ring.good(1.0) is ring.certified[0]


def test_what_the_present_state_was_trained_from() -> None:
    """It is the newest certified snapshot, or the state beside the run that the run has gone on from since."""
    ring = Ring()
    assert ring.origin() is None
    ring = ring_of([1.0, 2.0])
    assert ring.origin() is ring.certified[0]
    beside = snapshot_at(2, 0.5)
    for leave in (lambda: (ring.add(snapshot_at(3, 0.5)), ring.certify()), lambda: ring.discard_newer(1), ring.clear):
        ring.beside = beside
        assert ring.origin() is beside
        leave()
        assert ring.origin() is next(iter(ring.certified), None)
