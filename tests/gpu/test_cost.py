"""On a CUDA device a healthy step waits for nothing, snapshots overlap the run, and captured graphs keep working.

``python -m pytest tests/gpu`` runs all of it, in minutes; skipped where there is no device.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from torch import Tensor, nn

from lightning_nanguard import NaNGuard
from lightning_nanguard.guard.snapshot_manager import SnapshotManager
from lightning_nanguard.state.snapshot_room import DevicePeaks
from tests.gpu.test_cuda import Net, data, train
from tests.helpers import same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

HOOKS = ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_train_batch_end")


@contextmanager
def no_sync(monkeypatch: pytest.MonkeyPatch, after: int = 5) -> Iterator[list[str]]:
    """From batch ``after`` on, whatever waits for the device inside the guard's hooks raises."""
    entered: list[str] = []
    batches = [0]
    for name in HOOKS:
        hook: Callable[..., Any] = getattr(NaNGuard, name)

        def strict(*args: Any, name: str = name, hook: Callable[..., Any] = hook, **kwargs: Any) -> Any:
            batches[0] += name == "on_train_batch_start"
            if batches[0] <= after:
                return hook(*args, **kwargs)
            before = torch.cuda.get_sync_debug_mode()
            try:
                with warnings.catch_warnings():
                    # That it is a prototype, once.
                    warnings.simplefilter("ignore")
                    torch.cuda.set_sync_debug_mode("error")
                entered.append(name)
                return hook(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode(before)

        monkeypatch.setattr(NaNGuard, name, functools.wraps(hook)(strict))
    yield entered


@pytest.mark.parametrize("device", ["same", "cpu"])
def test_a_healthy_step_waits_for_nothing(device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring, judging, snapshots and their certification, with a fused optimizer, wherever snapshots lie."""
    guard = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=4, snapshot_device=device)
    with no_sync(monkeypatch) as entered:
        train(data(), True, guard)
    assert len(entered) > 100
    assert len(guard.interventions) == 0


def test_the_watch_sees_a_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same watch stops a step readback, which waits once a step."""
    guard = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=4, readback="step")
    with no_sync(monkeypatch), pytest.raises(RuntimeError, match="synchronizing"):
        train(data(), True, guard)


@pytest.mark.parametrize("bad", [[20], [20, 21], [20, 21, 22]], ids=str)
def test_late_skips_are_exact(bad: list[int], tmp_path: Path) -> None:
    """With a fused optimizer, batch norm included, bad batches in a row leave nothing behind and cost no rollback."""
    spoilt = data()
    for index in bad:
        spoilt[index][0, 0] = math.nan
    guard = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=4, readback="deferred")
    guarded = train(spoilt, True, guard)
    never = train([batch for index, batch in enumerate(data()) if index not in bad], True, None)
    assert same_bits([guarded["weights"], guarded["state"]], [never["weights"], never["state"]])
    assert [(record.remedies, record.batch_idx) for record in guard.interventions] == [(("skip",), b) for b in bad]


def test_a_late_rollback_says_what_it_costs(tmp_path: Path) -> None:
    """With another optimizer the run ends in a state from before the fault, found at most two updates later."""
    guard = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=4, readback="deferred")
    ended = train(data(bad=20), False, guard)
    (record,) = guard.interventions
    assert record.remedies == ("restore",)
    assert record.snapshot_step is not None
    assert record.snapshot_step <= 20
    assert 0 < record.updates_lost <= 23 - record.snapshot_step
    assert all(bool(torch.isfinite(tensor).all()) for tensor in ended["weights"].values())


@pytest.mark.parametrize("averaged", [False, True])
def test_snapshots_in_host_memory_are_pinned_and_whole(
    averaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied beside the run, each snapshot holds the weights of its own step, in pinned memory that is used again; also
    where averages take the weights' place, right behind a batch, to be validated."""
    others: list[Callback] = []
    options: dict[str, Any] = {}
    if averaged:
        others.append(pytest.importorskip("pytorch_lightning.callbacks.weight_averaging").WeightAveraging())
        options = {"val_check_interval": 2, "limit_val_batches": 2, "num_sanity_val_steps": 0}
    expected: dict[int, Tensor] = {}
    places: set[int] = set()
    take = SnapshotManager.capture

    def taken(self: SnapshotManager, *args: Any, **kwargs: Any) -> Any:
        snapshot = take(self, *args, **kwargs)
        expected[snapshot.step] = dict(self._learner.weights())[("parameter", "net.0.weight")].detach().clone()
        return snapshot

    class Compare(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            run = guard._fit
            assert run is not None
            for snapshot in run.context.ring.certified:
                kept = snapshot.leaves[("parameter", "net.0.weight")]
                assert kept.is_pinned()
                places.add(kept.data_ptr())
                assert torch.equal(kept, expected[snapshot.step].cpu())

    monkeypatch.setattr(SnapshotManager, "capture", taken)
    guard = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=2, snapshot_device="cpu")
    train(data(), True, guard, [Compare(), *others], **options)
    assert len(expected) > 8
    assert len(places) == 3


def test_memory_does_not_grow(tmp_path: Path) -> None:
    """After the ring is full, the device's allocations stay as they are, but for the few numbers on their way."""
    seen: list[int] = []

    class Look(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(torch.cuda.memory_allocated())

    train(data() * 5, True, NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=3), [Look()])
    assert max(seen[100:]) <= max(seen[40:100]) + (64 << 10)


def test_the_place_is_chosen_from_the_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first updates leave no room, snapshots go to host memory by themselves."""
    monkeypatch.setattr(DevicePeaks, "room", lambda self, where, memory, held: 0.0)
    kept: list[str] = []

    class Look(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            run = guard._fit
            assert run is not None
            kept.extend(run.context.ring.certified[0].leaves[("parameter", "net.0.weight")].device.type)

    guard = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=4)
    train(data(), True, guard, [Look()])
    assert "".join(kept) == "cpu"


@pytest.mark.filterwarnings("ignore")  # the compiler has its own
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_steps_keep_working(mode: str, tmp_path: Path) -> None:
    """torch.compile, also with CUDA graphs: healthy runs are the same, and a bad batch is skipped."""

    class Compiled(Net):
        def __init__(self, fused: bool) -> None:
            super().__init__(fused)
            self.net = torch.compile(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1)), mode=mode)

    bare = train(data(), True, None, module=Compiled)
    guard = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=4)
    assert same_bits(train(data(), True, guard, module=Compiled), bare)
    guard = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=4)
    spoilt = train(data(bad=20), True, guard, module=Compiled)
    assert [record.remedies for record in guard.interventions] == [("skip",)]
    assert same_bits(spoilt["weights"], train(data(without=20), True, None, module=Compiled)["weights"])
