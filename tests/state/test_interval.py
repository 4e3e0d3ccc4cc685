"""The interval between snapshots."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_nanguard.state.interval import Interval


class Clock:
    """A clock that the test sets."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_a_fixed_interval_stays() -> None:
    """An interval that was set is never measured away."""
    interval = Interval(7)
    interval.measure(started=-1e9, since=7, made=10**6)
    assert interval.updates == 7
    assert [interval.until_next(last) for last in (0, 7, 1000)] == [7, 7, 7]


@pytest.mark.parametrize(("every", "expected"), [(64, [16, 32, 64, 128, 192, 256]), (1024, [128, 256])])
def test_a_long_interval_grows_with_the_run(every: int, expected: list[int]) -> None:
    """Early on snapshots come more often than the interval says, but never more than eight times as often."""
    interval, last, taken = Interval(None), 0, []
    while (last := last + interval.until_next(last, every)) <= 256:
        taken.append(last)
    assert taken == expected


@pytest.mark.parametrize(("capturing", "certifying"), [(0.001, 0.0), (0.001, 0.003), (0.0, 0.002)])
def test_the_interval_keeps_the_share(capturing: float, certifying: float) -> None:
    """Taking snapshots and looking at them together take at most 1 % of the updates' time, slow moments or not."""
    clock = Clock(100.0)
    interval = Interval(None, clock=clock)
    for slow in (1.0, 1.0, 40.0, 1.0, 1.0):
        since = interval.updates
        clock.now += since * 0.001  # an update takes a millisecond
        interval.certified(slow * certifying)
        started = clock.now
        clock.now += slow * capturing
        interval.measure(started, since, made=100)
    assert (capturing + certifying) / (interval.updates * 0.001) <= 0.01
    assert interval.updates <= 2 * 100 * (1000 * (capturing + certifying))


@given(cost=st.floats(0.01, 10.0), made=st.integers(100_000, 10_000_000))
def test_in_a_long_run_the_interval_loses_least(cost: float, made: int) -> None:
    """Time lost to snapshots and to one fault at a random moment lies within a quarter of the least there is."""
    clock = Clock()
    interval = Interval(None, clock=clock)
    for _ in range(4):
        started = clock.now = clock.now + 16.0
        clock.now += cost
        interval.measure(started, since=16, made=made)

    def lost(every: float) -> float:
        return cost * made / every + every / 2

    assume(16 < interval.updates < 1 << 14)
    best = min(lost(max(every, cost / 0.01)) for every in range(16, 1 << 14, 4))
    assert lost(interval.updates) <= 1.26 * best


def test_device_time_counts_among_what_snapshots_cost() -> None:
    """What a copy takes of the device adds to what the host sees of it."""
    intervals = []
    for on_device in (0.0, 0.7):
        clock = Clock()
        interval = Interval(None, clock=clock)
        for count in range(1, 4):
            clock.now += 16 * 0.1
            started = clock.now
            clock.now += 0.1
            interval.measure(started, 16, 16 * count)
            interval.took_device(on_device)
        intervals.append(interval.updates)
    assert intervals == [128, 1024]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(
    ("pinning", "later", "update"), [(1.0, 0.03, 0.06), (5.0, 0.05, 0.3), (25.0, 0.3, 1.0)], ids=["124M", "1.5B", "7B"]
)
def test_memory_that_is_allocated_once_is_no_part_of_the_price(
    told: bool, pinning: float, later: float, update: float
) -> None:
    """Pinning the memory of the first four snapshots keeps none of them away, whether it is told apart or not."""
    clock = Clock()
    interval, last, taken = Interval(None, clock=clock), 0, []
    for count in range(6):
        step = last + interval.until_next(last)
        clock.now += (step - last) * update
        started, once = clock.now, pinning if count < 4 else 0.0
        clock.now += once + later
        interval.measure(started, step - last, step, once if told else 0.0)
        taken.append(step)
        last = step
    assert taken[1] <= 64
    assert taken[3] <= (160 if told else 1024)
    assert later / (interval.updates * update) <= 0.01


def test_rollbacks_shorten_the_interval() -> None:
    """If a device begins to fail after a million updates, snapshots soon come more often than its faults. When it has
    stopped, they come less often again. A resumed run goes on from there."""
    clock = Clock()
    interval = Interval(None, clock=clock)

    def measured(made: int) -> int:
        started = clock.now = clock.now + 16.0
        clock.now += 0.3
        interval.measure(started, since=16, made=made)
        return interval.updates

    before = [measured(1_000_000) for _ in range(4)][-1]
    assert before == 1024
    seen = []
    for made in range(1_001_000, 1_005_000, 1000):
        interval.restored(made)
        seen.append(interval.updates)
    assert seen == [1024, 256, 64, 64]
    again = Interval(None, clock=clock)
    again.resume(interval.state_dict())
    assert again.state_dict() == interval.state_dict()
    assert [measured(3_000_000) for _ in range(4)][-1] == 2048


def test_a_fixed_interval_stays_after_rollbacks() -> None:
    """What the user sets is kept."""
    interval = Interval(7)
    interval.restored(100)
    assert interval.updates == 7
