"""When snapshots are taken, and how they are checked before they are certified."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback

from benchmarks.plain import PlainHost
from lightning_nanguard import NaNGuard, NonFinite
from lightning_nanguard.act.learning_rate import LearningRate
from lightning_nanguard.detect.monitors import Monitors
from lightning_nanguard.guard.context import GuardContext, Settings
from lightning_nanguard.guard.loop import BatchReplay
from lightning_nanguard.guard.snapshot_manager import SnapshotManager
from lightning_nanguard.state.finite import FiniteCheck
from lightning_nanguard.state.plausibility import PlausibilityCheck
from lightning_nanguard.state.side_copy import SideCopy
from lightning_nanguard.state.snapshot import capture
from tests.fake_device import fake_device
from tests.helpers import data_for, fit, task
from tests.state.nets import made, train

SETTLED = 1000


class Managed:
    """A network whose snapshots are managed, under a clock that the test sets."""

    def __init__(self, every: int | None = None) -> None:
        self.now = 0.0
        self.net, self.optimizer, self.learner = made("adam")
        self.context = GuardContext(
            self.learner,
            BatchReplay(),
            Monitors([]),
            LearningRate([self.optimizer]),
            settings=Settings(snapshot_every=every, clock=lambda: self.now),
        )
        self.context.state.healthy_steps = SETTLED
        self.ring = self.context.ring
        self.context.finite.begin(self.learner)
        self.plausibility = PlausibilityCheck(self.learner, self.ring, lambda state, than: False)
        self.manager = SnapshotManager(self.context, self.plausibility)

    def certify(self, step: int) -> str | None:
        """Take a snapshot, and certify it where nothing speaks against it."""
        pending = self.manager.capture(step, step, 0.1)
        fault, ranks = self.manager.objection(pending)
        assert ranks == ()
        if fault is None:
            assert self.manager.kept(pending) is pending
            self.ring.certify()
        return None if fault is None else f"{fault.kind}: {fault.place}"


def test_snapshots_fall_due_by_the_interval() -> None:
    """One is due an interval after the last, after what is restored, or at once where it is wanted."""
    managed = Managed(every=5)
    manager = managed.manager
    assert [manager.due(step) for step in (4, 5)] == [False, True]
    managed.manager.capture(5, 5, 0.1)
    assert [manager.due(step) for step in (9, 10)] == [False, True]
    manager.count_from(8)
    assert [manager.due(step) for step in (12, 13)] == [False, True]
    manager.want()
    assert manager.due(9)
    manager.capture(9, 9, 0.1)
    assert not manager.due(9)


@pytest.mark.parametrize(("cost", "interval"), [(1e-6, 16), (0.002, 256), (0.02, 2048)])
def test_the_interval_is_measured_by_the_clock_given(
    cost: float, interval: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Captures that take long come rarely; the user is told once, when it has been measured twice."""
    caplog.set_level("INFO", "lightning_nanguard")
    managed = Managed()
    learner = managed.manager._learner
    leaves: Callable[[], Any] = learner.leaves

    def slow() -> Any:
        managed.now += cost
        return leaves()

    learner.leaves = slow  # type: ignore[method-assign]
    for step in (16, 32, 48):
        managed.now += 16 * 0.001
        managed.manager.capture(step, step, 0.1)
    assert managed.manager.tell()[0] == interval
    assert caplog.text.count(f"every {interval} updates, on the device of the weights. Up to 4 are kept") == 1


def test_a_snapshot_is_looked_at_before_it_is_certified() -> None:
    """One with a tensor that is not finite, or far beyond the last certified one, is objected to."""
    managed = Managed()
    train(managed.net, managed.optimizer, 1, seed=1)
    assert managed.certify(1) is None
    managed.optimizer.state[managed.net.first.weight]["exp_avg"][0, 0] = math.nan
    assert managed.certify(2) == "corrupted_state: optimizer state exp_avg of first.weight"
    managed.optimizer.state[managed.net.first.weight]["exp_avg"][0, 0] = 0.0
    managed.net.last.weight.data[0, 0] = 1e6
    assert managed.certify(3) == "implausible_state: parameter last.weight"
    assert [snapshot.step for snapshot in managed.ring.certified] == [1]


def test_the_state_is_looked_at_between_snapshots() -> None:
    """At most twice an interval, against the newest certified snapshot, and without a copy."""
    managed = Managed(every=4)
    manager, weight = managed.manager, managed.net.last.weight
    train(managed.net, managed.optimizer, 1, seed=1)
    assert not manager.look_due(4)  # nothing is certified
    assert managed.certify(1) is None
    assert [manager.look_due(step) for step in (2, 3)] == [False, True]
    managed.context.state.step = 3
    assert manager.look() is None
    assert [manager.look_due(step) for step in (4, 5)] == [False, True]
    for value, kind in ((1e6, "implausible_state"), (math.inf, "corrupted_state")):
        weight.data[0, 0] = value
        fault = manager.look()
        assert fault is not None
        assert (fault.kind, fault.place) == (kind, "parameter last.weight")
    assert managed.ring.pending is None


@pytest.mark.parametrize("certified", [False, True])
def test_a_state_trained_beside_the_run_is_compared_with_itself(certified: bool) -> None:
    """Where the run has gone on from such a state, it may be far from the newest certified snapshot. A weight that is
    lost after it is found, before and after the next snapshot is certified."""
    managed = Managed(every=4)
    train(managed.net, managed.optimizer, 1, seed=1)
    assert managed.certify(1) is None
    managed.net.last.weight.data.fill_(1e6)
    managed.manager.continue_from(capture(managed.learner, step=2, global_step=2))
    assert managed.manager.look() is None
    if certified:
        assert managed.certify(3) is None
    managed.net.last.weight.data.fill_(1e12)
    fault = managed.manager.look()
    assert fault is not None
    assert fault.kind == "implausible_state"


def test_a_pending_snapshot_is_judged_when_its_norms_have_arrived() -> None:
    """On the CPU they have at once; among one process there is nobody to agree with."""
    managed = Managed()
    pending = managed.manager.capture(3, 30, 0.25)
    assert managed.ring.pending is pending
    assert (pending.step, pending.global_step, pending.rate) == (3, 30, 0.25)
    assert managed.manager.judged(pending)


def test_whoever_looks_at_the_state_waits_for_copies_first() -> None:
    """A check comes before averages take the weights' place: what is on its way must be there by then."""
    net, optimizer, _ = made("adam")
    guard = PlainHost().make_guard(net, optimizer, Settings())
    guard.start()
    learner = guard.context.learner
    learner.device, driver = fake_device()
    copies = SideCopy(learner.device)
    guard._parts.snapshots.placement._side_copy = copies
    live = net.last.weight.detach()
    check = copies.send([learner.device.pinned_like(live)], [live])
    guard.check()
    net.last.weight.data.add_(1.0)
    driver.finish()
    assert check.intact()


def test_a_torn_snapshot_is_replaced() -> None:
    """Where somebody wrote to the weights while they were copied, another snapshot is due at once."""
    managed = Managed(every=5)
    managed.learner.device, driver = fake_device()
    settings = Settings(snapshot_every=5, snapshot_device=torch.device("cpu"))
    manager = SnapshotManager(replace(managed.context, settings=settings), managed.plausibility)
    for step, writes in ((5, False), (10, True)):
        pending = manager.capture(step, step, 0.1)
        assert pending is not None
        assert not manager.judged(pending)
        if writes:
            managed.net.last.weight.data.add_(1.0)
        driver.finish()
        assert manager.judged(pending)
        assert manager.is_whole(pending) is not writes
        assert manager.due(step + 1) is writes


def test_a_long_run_takes_bounded_memory_and_rare_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more memory is taken than for the ring and the one that is pending, and it is let go of at the end of the fit.
    A tensor too wide for its norm to tell is looked into once: after that its largest element comes with the norms."""
    looks: list[int] = []
    look = FiniteCheck.corrupt

    def looked(self: FiniteCheck, leaves: Any) -> str | None:
        looks.append(guard._fit.guard.updates if guard._fit is not None else -1)
        return look(self, leaves)

    places, steps, rings = set[int](), set[int](), []

    class Look(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            assert guard._fit is not None
            ring = guard._fit.context.ring
            for snapshot in (*ring.certified, *([] if ring.pending is None else [ring.pending])):
                steps.add(snapshot.step)
                places.add(snapshot.leaves["parameter", "net.0.weight"].data_ptr())

        def on_train_end(self, *args: Any) -> None:
            assert guard._fit is not None
            rings.append(guard._fit.context.ring)
            assert rings[0].certified

    monkeypatch.setattr(FiniteCheck, "corrupt", looked)
    module = task("norm")
    module.net.table = torch.nn.Parameter(torch.ones(2_000_000), requires_grad=False)
    guard = NaNGuard([NonFinite()], snapshot_every_n_steps=1, act_on="evidence")
    fit(module, data_for("norm", 130), guard, folder=tmp_path, callbacks=[Look()])
    assert len(guard.interventions) == 0
    assert len(steps) > 30
    assert len(places) <= 5
    (ring,) = rings
    assert (ring.certified, ring.pending, ring.spare()) == ([], None, None)
    assert len([step for step in looks if 0 < step < 130]) == 1


def test_a_pending_snapshot_is_certified_without_an_average_that_went_bad() -> None:
    """A bad averaged copy in it is replaced by the certified one, or left out; with bad weights it is dropped."""
    managed, mean = Managed(), torch.ones(3)
    managed.learner._averages = lambda: {"ema": {"w": mean}}
    assert managed.certify(1) is None
    mean.fill_(math.nan)
    pending = managed.manager.capture(2, 2, 0.1)
    managed.manager.mend_pending("")
    assert managed.ring.pending is pending
    assert managed.manager.objection(pending) == (None, ())
    assert pending.leaves["average", "ema", "w"].tolist() == [1.0] * 3
    managed.ring.certified.clear()
    managed.manager.capture(3, 3, 0.1)
    managed.manager.mend_pending("")
    assert ("average", "ema", "w") not in managed.ring.pending.leaves
    managed.ring.pending.leaves["parameter", "last.weight"].fill_(math.nan)
    managed.manager.mend_pending("")
    assert managed.ring.pending is None
