"""Snapshots: bitwise, in place, repeatable; kept in a ring and certified."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pytorch_lightning import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.plain import PlainHost
from lightning_nanguard import NaNGuard
from lightning_nanguard.guard.guard import Settings
from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.state.finite import allowances, corrupt
from lightning_nanguard.state.interval import Interval
from lightning_nanguard.state.learner import Learner, describe
from lightning_nanguard.state.restore import restore
from lightning_nanguard.state.ring import Ring
from lightning_nanguard.state.snapshot import Snapshot, capture
from tests.helpers import copied, data_for, fit, same_bits, task


class Net(nn.Module):
    """Weights, batch norm, a mask of −inf, a buffer that is not persistent, tied and frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 4)
        self.tied = self.first
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("mask", torch.full((4,), -math.inf))
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.last(torch.relu(self.norm(self.first(x))))


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.5, max_iter=3),
}


def train(net: nn.Module, optimizer: Optimizer, steps: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(6, 4, generator=draw)

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = (net(x) - x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def everything(net: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    return {"weights": dict(net.named_parameters()), "buffers": dict(net.named_buffers()),
            "state": optimizer.state_dict()["state"]}  # fmt: skip


def made(name: str) -> tuple[Net, Optimizer, Learner]:
    net = Net()
    optimizer = OPTIMIZERS[name]([p for p in net.parameters() if p.requires_grad])
    return net, optimizer, Learner(net, [optimizer])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 3], ids=["from the start", "in mid-run"])
def test_a_restore_is_bitwise_and_repeatable(name: str, before: int) -> None:
    """Going back twice to one snapshot gives the same bits, and training on from it the same run."""
    net, optimizer, learner = made(name)
    train(net, optimizer, before, seed=1)
    snapshot = capture(learner, step=before, global_step=before)
    then = copied(everything(net, optimizer))
    ends = []
    for _ in range(2):
        train(net, optimizer, 4, seed=2)
        ends.append(copied(everything(net, optimizer)))
        restore(learner, snapshot)
        assert same_bits(everything(net, optimizer), then)
    assert same_bits(ends[0], ends[1])


def test_a_restore_is_in_place() -> None:
    """Tensors keep their identity, so whoever holds them sees the state gone back to."""
    net, optimizer, learner = made("adam")
    train(net, optimizer, 2, seed=1)
    snapshot = capture(learner, step=2, global_step=2)
    held = {id(tensor) for tensor in [*net.parameters(), *net.buffers()]}
    moments = {id(value) for entry in optimizer.state.values() for value in entry.values()}
    train(net, optimizer, 2, seed=2)
    restore(learner, snapshot)
    assert held == {id(tensor) for tensor in [*net.parameters(), *net.buffers()]}
    assert moments == {id(value) for entry in optimizer.state.values() for value in entry.values()}


def test_memory_is_taken_over() -> None:
    """A capture into a snapshot no longer needed allocates nothing new and does not touch another snapshot."""
    net, optimizer, learner = made("adam")
    train(net, optimizer, 1, seed=1)
    old, kept = (capture(learner, step=1, global_step=1) for _ in range(2))
    places = {path: leaf.data_ptr() for path, leaf in old.leaves.items() if isinstance(leaf, Tensor)}
    saved = copied(kept.leaves)
    train(net, optimizer, 1, seed=2)
    new = capture(learner, step=2, global_step=2, reuse=old)
    assert {path: leaf.data_ptr() for path, leaf in new.leaves.items() if isinstance(leaf, Tensor)} == places
    assert same_bits(kept.leaves, saved)


def test_rates_are_the_clocks() -> None:
    """A rollback leaves learning rates, and what else schedulers write, as they are."""
    _, optimizer, learner = made("sgd")
    snapshot = capture(learner, step=0, global_step=0)
    optimizer.param_groups[0].update(lr=0.01, momentum=0.5)
    optimizer.param_groups[0]["counted"] = 3
    restore(learner, snapshot)
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert optimizer.param_groups[0]["momentum"] == 0.5


def test_what_the_snapshot_lacks_is_left_alone() -> None:
    """A parameter added since stays as it is; optimizer state the snapshot lacks goes."""
    net, optimizer, learner = made("adam")
    snapshot = capture(learner, step=0, global_step=0)
    train(net, optimizer, 1, seed=1)
    net.added = nn.Linear(2, 2)
    added = net.added.weight.detach().clone()
    restore(learner, snapshot)
    assert torch.equal(net.added.weight, added)
    assert not optimizer.state


class Scaler:
    """A GradScaler's state."""

    def __init__(self, scale: float, tracker: int) -> None:
        self.state = {"scale": scale, "_growth_tracker": tracker}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = dict(state_dict)


@pytest.mark.parametrize(("now", "after"), [(64.0, 64.0), (4096.0, 1024.0)])
def test_the_scale_never_grows_by_a_rollback(now: float, after: float) -> None:
    """The growth tracker goes back, the scale only down."""
    net = Net()
    scaler = Scaler(1024.0, 7)
    learner = Learner(net, [], scaler)
    snapshot = capture(learner, step=0, global_step=0)
    scaler.state = {"scale": now, "_growth_tracker": 99}
    restore(learner, snapshot)
    assert scaler.state == {"scale": after, "_growth_tracker": 7}


def test_a_mask_is_no_poison() -> None:
    """What was not finite at the start is allowed, and only there."""
    net, _, learner = made("sgd")
    allowed = allowances(learner.weights())
    assert corrupt(learner.leaves(), allowed) is None
    net.mask[1] = 0.0
    assert corrupt(learner.leaves(), allowed) is None
    net.norm.running_var[2] = math.nan
    assert corrupt(learner.leaves(), allowed) == "buffer norm.running_var"


def test_names_are_the_users() -> None:
    """Paths are told in words a user knows from the module."""
    net, optimizer, learner = made("adam")
    train(net, optimizer, 1, seed=1)
    optimizer.state[net.first.weight]["exp_avg_sq"][0, 0] = math.inf
    assert corrupt(learner.leaves(), allowances(learner.weights())) == "optimizer state exp_avg_sq of first.weight"
    assert describe(("group", 0, 1, "k")) == "k in group 1 of optimizer 0"
    assert describe(("average", "EMA", "w")) == "w in the averaged copy of EMA"


def snapshot_at(step: int, level: float | None) -> Snapshot:
    return Snapshot(step, step, {}, level=level)


def ring_of(levels: list[float], capacity: int = 3, margin: float = 0.1) -> list[int]:
    ring = Ring(capacity, certify_after=2)
    for step, level in enumerate(levels):
        ring.add(snapshot_at(step, level))
        assert not ring.healthy(step)  # measured before this state was
        assert not ring.healthy(step + 1)
        assert ring.healthy(step + 2)
        ring.certify(margin)
    return [snapshot.step for snapshot in ring.certified]


def test_the_newest_are_kept_while_the_loss_falls() -> None:
    """A ring of three keeps the three newest, newest first."""
    assert ring_of([5.0, 4.0, 3.0, 2.0, 1.0]) == [4, 3, 2]


def test_the_best_is_kept_while_the_loss_rises() -> None:
    """A fault found late needs the state from before it began: the oldest stays while nothing newer is better."""
    assert ring_of([1.0, 2.0, 3.0, 4.0, 5.0]) == [4, 3, 0]


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.integers(1, 5))
@settings(deadline=None)
def test_a_ring_is_bounded_and_ordered(levels: list[float], capacity: int) -> None:
    """Never more than its capacity, the newest always there, newest first."""
    steps = ring_of(levels, capacity)
    assert len(steps) <= capacity
    assert steps == sorted(steps, reverse=True)
    assert steps[0] == len(levels) - 1


def test_a_pending_snapshot_under_suspicion_goes() -> None:
    """What is dropped is neither pending nor certified, and its memory is used again."""
    ring = Ring()
    one = snapshot_at(0, 1.0)
    ring.add(one)
    ring.drop_pending()
    assert ring.pending is None
    assert ring.spare() is one


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
def test_the_interval_keeps_the_share(capturing: float, certifying: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking snapshots and looking at them together take at most 1 % of the updates' time, slow moments or not."""
    from lightning_nanguard.state import interval as ring

    now = 100.0
    monkeypatch.setattr(ring.time, "perf_counter", lambda: now)
    interval = Interval(None)
    for slow in (1.0, 1.0, 40.0, 1.0, 1.0):
        since = interval.updates
        now += since * 0.001  # an update takes a millisecond
        interval.certified(slow * certifying)
        started = now
        now += slow * capturing
        interval.measure(started, since, made=100)
    assert (capturing + certifying) / (interval.updates * 0.001) <= 0.01
    assert interval.updates <= 2 * 100 * (1000 * (capturing + certifying))


@given(cost=st.floats(0.01, 10.0), made=st.integers(100_000, 10_000_000))
def test_in_a_long_run_the_interval_loses_least(cost: float, made: int) -> None:
    """Time lost to snapshots and to one fault at a random moment lies within a quarter of the least there is."""
    from lightning_nanguard.state import interval as ring

    now = 0.0
    with patch.object(ring.time, "perf_counter", lambda: now):
        interval = Interval(None)
        now = 16.0
        started, now = now, now + cost
        interval.measure(started, since=16, made=made)

    def lost(every: float) -> float:
        return cost * made / every + every / 2

    assume(16 < interval.updates < 1 << 14)
    best = min(lost(max(every, cost / 0.01)) for every in range(16, 1 << 14, 4))
    assert lost(interval.updates) <= 1.26 * best


# batch scope


def test_a_batch_leaves_nothing_behind() -> None:
    """Batch-norm statistics, counters, and large buffers that turn out to change are put back bit by bit."""
    net = Net()
    net.register_buffer("large", torch.zeros(100_000))
    scope = BatchUndo(net)
    scope.open()
    net.large[0] = 1.0  # seen to change: copied from the next batch on
    scope.open()
    before = copied(dict(net.named_buffers()))
    net(torch.randn(6, 4))
    net.large[1] = math.nan
    scope.undo()
    assert same_bits(dict(net.named_buffers()), before)


# place


class Sent:
    """Stands in for a copy to the host that is under way."""

    def __init__(self) -> None:
        self.waited = 0

    def synchronize(self) -> None:
        self.waited += 1


def test_a_copy_under_way_is_waited_for_before_it_is_used() -> None:
    """Going back to a snapshot waits for it to arrive, once."""
    _, _, learner = made(next(iter(OPTIMIZERS)))
    taken, sent = capture(learner, step=0, global_step=0), Sent()
    taken.done = [sent]
    restore(learner, taken)
    restore(learner, taken)
    assert sent.waited == 1


def test_what_is_written_to_while_it_is_copied_is_no_snapshot() -> None:
    """Weights that somebody changes between the copy's start and the next update would be torn."""
    from lightning_nanguard.state.device import SideStreamCopy

    weight = torch.zeros(3)
    courier = SideStreamCopy()
    assert courier.settle()
    courier.send(lambda: None, [weight])
    assert courier.settle()
    courier.send(lambda: None, [weight])
    weight.add_(1.0)
    assert not courier.settle()
    assert courier.settle(), "and it is forgotten"
    courier.send(lambda: None, [weight])
    weight.data = torch.zeros(3)
    assert not courier.settle()
    assert courier.waited() == 0.0


def test_a_glance_at_a_wide_tensor_is_as_sharp() -> None:
    """The norm of a large embedding lies beyond what one element may be: once that was seen its largest element is sent
    too, and what is wrong with it shows as before."""
    from lightning_nanguard.state.norm_screen import NormScreen

    wide, narrow = ("parameter", "embedding"), ("parameter", "bias")
    state = {wide: torch.ones(2_000_000), narrow: torch.ones(10)}
    first = NormScreen(state.items())
    assert first.beyond({}, 1e3) == {wide}
    for value, bad in ((1.0, set()), (999.0, set()), (1001.0, {wide}), (math.nan, {wide}), (-math.inf, {wide})):
        state[wide][12_345] = value
        assert NormScreen(state.items(), {wide}).beyond(first.typical, 1e3) == bad
        assert NormScreen(state.items(), {wide}).typical[narrow] == pytest.approx(1.0)


@pytest.mark.parametrize("several", [False, True], ids=["tensors", "lists of tensors"])
def test_what_was_moved_comes_back_to_its_device(several: bool) -> None:
    """A snapshot that lies elsewhere knows where the originals lay, also of what an optimizer has forgotten since."""
    net, optimizer, learner = made("lbfgs" if several else "adam")
    train(net, optimizer, 3, seed=1)
    taken = capture(learner, step=0, global_step=0, device=torch.device("cpu"))
    tensors = {path for path, leaf in taken.leaves.items() if isinstance(leaf, torch.Tensor)}
    assert set(taken.homes) >= tensors
    before = copied(optimizer.state_dict()["state"])
    assert before
    optimizer.state.clear()
    restore(learner, taken)
    assert same_bits(optimizer.state_dict()["state"], before)
    assert capture(learner, step=0, global_step=0).homes == {}


def test_where_nothing_can_be_pinned_a_copy_is_made_all_the_same() -> None:
    """A host without pinned memory left, or without a device as here, gives ordinary memory."""
    from lightning_nanguard.state.snapshot import _pinned_like

    made = _pinned_like(torch.ones(3, 2).T)
    assert made.device.type == "cpu"
    assert made.shape == (2, 3)
    assert not made.is_pinned()


def test_a_wide_tensor_is_looked_into_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After that its largest element comes with the others, and no certification waits for the device."""
    from lightning_nanguard.guard.snapshot_manager import SnapshotManager

    looks: list[int] = []
    look = SnapshotManager._objection

    def looked(self: SnapshotManager, pending: Snapshot, healthy_steps: int) -> Any:
        looks.append(pending.step)
        return look(self, pending, healthy_steps)

    monkeypatch.setattr(SnapshotManager, "_objection", looked)
    module = task()
    module.net.register_buffer("table", torch.ones(2_000_000))
    guard = NaNGuard(snapshot_every_n_steps=10)
    fit(module, data_for("mlp", 160), guard, folder=tmp_path)
    assert len(looks) == 1
    assert len(guard.interventions) == 0


def test_device_time_counts_among_what_snapshots_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a copy takes of the device adds to what the host sees of it."""
    from lightning_nanguard.state import interval as ring

    now = 0.0
    monkeypatch.setattr(ring.time, "perf_counter", lambda: now)
    intervals = []
    for on_device in (0.0, 0.7):
        now, interval = 0.0, Interval(None)
        for count in range(1, 4):
            now += 16 * 0.1
            started = now
            now += 0.1
            interval.measure(started, 16, 16 * count)
            interval.took_device(on_device)
        intervals.append(interval.updates)
    assert intervals == [128, 1024]


def test_nothing_is_held_after_a_fit(tmp_path: Path) -> None:
    """Snapshots are let go of at the end of a fit, not when the garbage collector comes by."""
    rings = []

    class Look(Callback):
        def on_train_end(self, *args: Any) -> None:
            assert guard._run is not None
            rings.append(guard._run.guard.ring)
            assert rings[0].certified

    guard = NaNGuard(snapshot_every_n_steps=2)
    fit(task(), data_for("mlp", 12), guard, folder=tmp_path, callbacks=[Look()])
    (ring,) = rings
    assert ring.certified == []
    assert ring.pending is None
    assert ring.spare() is None


def test_whoever_looks_at_the_state_waits_for_copies_first() -> None:
    """A check comes before averages take the weights' place: what is on its way must be there by then."""
    net, optimizer, _ = made("adam")
    guard = PlainHost().make_guard(net, optimizer, Settings())
    guard.start()
    guard._keeper._courier.send(lambda: None, list(net.parameters()))
    guard.check()
    with torch.no_grad():
        net.last.weight.add_(1.0)
    assert guard._keeper._courier.settle()
    # Who writes in between has the copies made on the run's own stream from then on.
    guard._keeper._courier.send(lambda: None, list(net.parameters()))
    with torch.no_grad():
        net.last.weight.add_(1.0)
    guard._keeper.settle()
    assert guard.ring.pending is None
    assert not guard._keeper._overlap


@pytest.mark.parametrize(
    ("free", "cached", "peak", "fits"), [(50, 30, 20, True), (10, 60, 20, True), (10, 60, 50, False)]
)
def test_room_is_what_the_peak_leaves(free: int, cached: int, peak: int, fits: bool) -> None:
    """What the allocator holds but never used at once is room as well; a twentieth is left free."""
    from lightning_nanguard.state.device import DeviceMemory

    assert DeviceMemory(total=100, free=free, cached=cached, peak=peak).fits(40) is fits


def test_memory_of_snapshots_is_used_again(tmp_path: Path) -> None:
    """Over a long run no more memory is taken than for the ring and the one that is pending."""
    from lightning_nanguard import NaNGuard
    from lightning_nanguard.guard.snapshot_manager import SnapshotManager
    from tests.helpers import data_for, fit, task

    places: set[int] = set()
    snapshots = []
    take = SnapshotManager.capture

    def taken(self: SnapshotManager, *args: Any) -> Snapshot:
        snapshot = take(self, *args)
        snapshots.append(snapshot.step)
        places.add(snapshot.leaves[("parameter", "net.0.weight")].data_ptr())
        return snapshot

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SnapshotManager, "capture", taken)
        fit(task("norm"), data_for("norm", 120), NaNGuard(snapshot_every_n_steps=1), folder=tmp_path)
    assert len(snapshots) > 30
    assert len(places) <= 5
