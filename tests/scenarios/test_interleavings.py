"""Random orders of copies, writes, reads, skips and rollbacks on a device that works whenever it likes.

``RUNS=10000 python -m pytest tests/scenarios/test_interleavings.py`` runs as many of them.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from lightning_nanguard import Intervention
from lightning_nanguard.guard import plan_runner
from lightning_nanguard.guard.build import guard_for
from lightning_nanguard.guard.context import Settings
from lightning_nanguard.guard.local_readback import DeferredReadings
from lightning_nanguard.guard.loop import BatchReplay
from lightning_nanguard.guard.snapshot_manager import SnapshotManager
from lightning_nanguard.measure.readings import PendingReading
from lightning_nanguard.state.snapshot import Snapshot
from tests.fake_device import FakeDriver, fake_device
from tests.helpers import copied, same_bits

RUNS = int(os.environ.get("RUNS", "120"))
BLOCKS = 8


class Own(optim.AdamW):
    """An optimizer of the user's."""


MAKERS = {
    "fused adamw": lambda p: optim.AdamW(p, lr=1e-2, fused=True),
    "fused momentum": lambda p: optim.SGD(p, lr=1e-2, momentum=0.9, fused=True),
    "adamw": lambda p: optim.AdamW(p, lr=1e-2),
    "own": lambda p: Own(p, lr=1e-2, fused=True),
}


class Truth:
    """What was there when something was sent, to be compared with what came of it."""

    def __init__(self) -> None:
        self.states: dict[int, tuple[Snapshot, Any]] = {}
        self.numbers: dict[int, tuple[PendingReading, Any]] = {}
        self.looked_at: set[tuple[int, int]] = set()
        self.reads = 0
        # What the guard has gone back to; ``None`` once the state is another one.
        self.restored: Snapshot | None = None

    @contextmanager
    def watching(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        capture, defer, read = SnapshotManager.capture, DeferredReadings.defer, PendingReading.read
        apply = plan_runner.ActingRunner.apply

        def captured(manager: SnapshotManager, *args: Any, **options: Any) -> Any:
            snapshot = capture(manager, *args, **options)
            if snapshot is not None:
                self.states[id(snapshot)] = snapshot, copied(dict(manager._learner.leaves()))
            return snapshot

        def deferred(readings: DeferredReadings, pending: PendingReading, *args: Any, **options: Any) -> None:
            self.numbers[id(pending)] = pending, copied(pending.packed())
            defer(readings, pending, *args, **options)

        def was_read(pending: PendingReading, *args: Any) -> Any:
            if id(pending) in self.numbers:
                self.reads += 1
                assert pending._copy is not None
                sent = self.numbers[id(pending)][1].tolist()
                assert same_bits(pending._copy.read(), sent), "read before it had arrived"
            return read(pending, *args)

        def applied(runner: plan_runner.ActingRunner, *args: Any, **options: Any) -> Any:
            done = apply(runner, *args, **options)
            self.restored = done.restored
            return done

        with monkeypatch.context() as patched:
            patched.setattr(SnapshotManager, "capture", captured)
            patched.setattr(DeferredReadings, "defer", deferred)
            patched.setattr(PendingReading, "read", was_read)
            patched.setattr(plan_runner.ActingRunner, "apply", applied)
            yield

    def check(self, snapshot: Snapshot, live: Any = None) -> None:
        """A certified snapshot, or a state that was gone back to, is the one that the snapshot was taken of."""
        _, expected = self.states[id(snapshot)]
        if live is None:
            snapshot.wait()
            live = snapshot.leaves
            self.looked_at.add((id(snapshot), snapshot.step))
        assert same_bits(live, expected), "torn"


class Interleaving(BatchReplay):
    """One run: a small network, an optimizer, bad batches, and other code that writes to the weights.

    Args:
        seed: Draws all of it.
        truth: What is compared with.
    """

    def __init__(self, seed: int, truth: Truth) -> None:
        self.draw = draw = random.Random(seed)
        torch.manual_seed(seed)
        self.truth = truth
        self._comparable = draw.random() < 0.5
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.optimizer = MAKERS[draw.choice(sorted(MAKERS))]([*self.net.parameters()])
        device, self.driver = fake_device(draw.choice(("random", "random", "late")), seed=seed, devices=2)
        for tensor in self.net[2].state_dict(keep_vars=True).values():
            self.driver.put(tensor, 1)
        self.records: list[Intervention] = []
        self.held: dict[int, bool] = {}
        self.step = 0
        place = torch.device("cpu") if draw.random() < 0.8 else None
        settings = Settings(snapshot_every=draw.choice((1, 2, 3)), snapshot_device=place, deferred=draw.random() < 0.8)
        self.guard = guard_for(self.net, [self.optimizer], self, replay=self, settings=settings, device=device)

    def run(self, updates: int) -> None:
        """Make some updates, with something else between any two of them."""
        self.guard.start()
        for _ in range(updates):
            self.update()
            self.look()
            self.something_else()
        self.guard.finish()
        self.driver.finish()
        self.look()
        for record in self.records:
            if record.remedies == ("skip",):
                assert self.held[record.batch_idx], f"update {record.batch_idx} was reported held back and was made"
        assert all(bool(torch.isfinite(p).all()) for p in self.net.parameters())
        self.guard.close()

    def update(self) -> None:
        self.guard.open_batch()
        self.optimizer.zero_grad()
        batch = torch.randn(6, 3)
        kind = self.draw.choice(("good", "good", "good", "nan", "infinite loss")) if self.step > 4 else "good"
        if kind == "nan":
            batch[0, 0] = math.nan
        loss = (self.net(batch) - 1).square().mean()
        if kind == "infinite loss":
            loss = loss + math.inf
        self.driver.tick()
        self.guard.see_loss(loss)
        loss.backward()
        self.something_small()
        self.guard.before_step(0)
        before = self.weights()
        self.optimizer.step()
        self.held[self.step] = same_bits(before, self.weights())
        self.step += 1
        self.driver.tick()
        self.truth.restored = None
        self.guard.close_batch()

    def look(self) -> None:
        context = self.guard.context
        for snapshot in context.ring.certified:
            if (id(snapshot), snapshot.step) not in self.truth.looked_at:
                self.truth.check(snapshot)
        restored = self.truth.restored
        if restored is not None and restored.intact():
            self.truth.check(restored, dict(context.learner.leaves()))

    def something_small(self) -> None:
        """What happens between backward and step: hooks that write to a weight, or nothing."""
        if self.draw.random() < 0.1:
            self.net[0].weight.data.mul_(0.99)
        self.driver.tick()

    @torch.no_grad()
    def something_else(self) -> None:
        """What happens between two updates."""
        kind = self.draw.choice(("nothing", "nothing", "swap", "swap by data", "write", "check", "save", "finish"))
        parameters = list(self.net.parameters())
        if kind.startswith("swap"):
            kept = [parameter.detach().clone() for parameter in parameters]
            for values in ([value / 2 for value in kept], kept):
                for parameter, value in zip(parameters, values, strict=True):
                    (parameter if kind == "swap" else parameter.data).copy_(value)
                self.driver.tick()
        elif kind == "write":
            self.draw.choice(parameters).data.mul_(0.999)
        elif kind == "check":
            self.guard.check()
        elif kind == "save":
            self.guard.before_save()
            self.guard.after_save()
        elif kind == "finish":
            self.driver.finish()
        self.truth.restored = None

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.net.parameters()]

    def clock(self) -> tuple[int, int, int]:
        return self.step, 0, self.step - 1

    def updates_left(self) -> float:
        return float("inf")

    def micro_batches(self) -> int:
        return 1

    def record(self, intervention: Intervention) -> None:
        self.records.append(intervention)

    def advise(self, finding: Any, clock: Any = None) -> None:
        """Not looked at."""

    def diagnose(self, *args: Any) -> None:
        """Not looked for."""

    def comparable(self) -> bool:
        return self._comparable


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("block", range(BLOCKS))
def test_no_order_of_work_tears_a_snapshot_or_shows_a_number_too_early(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Certified snapshots and restored states are whole, readings are those that were sent, and what was reported held
    back was not made, in each of them."""
    seen = {"certified": 0, "reads": 0, "skipped": 0, "restored": 0}
    for seed in range(block, RUNS, BLOCKS):
        truth = Truth()
        with truth.watching(monkeypatch):
            one = Interleaving(seed, truth)
            try:
                one.run(updates=16)
            except BaseException as error:
                error.add_note(f"in the interleaving of seed {seed}") if hasattr(error, "add_note") else None
                raise
        seen["certified"] += len(truth.looked_at)
        seen["reads"] += truth.reads
        seen["skipped"] += sum(record.remedies == ("skip",) for record in one.records)
        seen["restored"] += sum("restore" in record.remedies for record in one.records)
    assert all(count > RUNS // BLOCKS // 4 for count in seen.values()), f"the runs must show something: {seen}"


def test_the_fake_device_is_late() -> None:
    """What is sent to the host is not there before its event: else the runs above would prove nothing."""
    driver = FakeDriver("late")
    target, source = driver.pinned_like(torch.ones(3)), torch.ones(3)
    for stream in (driver.own_stream(torch.device("cuda", 0)), driver.side_stream(torch.device("cuda", 0))):
        driver.to_host(stream, [target], [source])
        assert target.tolist() != [1.0] * 3
        event = driver.record(stream)
        assert not event.query()
        event.synchronize()
        assert target.tolist() == [1.0] * 3
        target.zero_()
