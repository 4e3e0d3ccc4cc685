"""Runs on a device that does its work as late as it may: nothing is torn, read too early or trusted blindly."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader

from benchmarks.gpu_parts import Weights
from lightning_nanguard import NaNGuard
from lightning_nanguard.act import skip
from lightning_nanguard.guard.snapshot_manager import SnapshotManager
from lightning_nanguard.measure.readings import PendingReading
from lightning_nanguard.state.device import Device, OutOfMemory
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.thresholds import Thresholds
from lightning_nanguard.thresholds.batches import (
    BatchesThresholds,
    HealthyBatchesThresholds,
    MicroBatchesThresholds,
    RepeatedStepsThresholds,
)
from lightning_nanguard.trainer import context as trainer_context
from tests.fake_device import FakeDriver, When, fake_device
from tests.helpers import copied, same_bits

Make = Callable[..., optim.Optimizer]
fused_adamw: Make = functools.partial(optim.AdamW, fused=True)


class Net(LightningModule):
    """A small network with batch norm."""

    def __init__(self, make: Make = fused_adamw) -> None:
        super().__init__()
        self.make = make
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> optim.Optimizer:
        return self.make(self.parameters(), lr=1e-2)


def data(count: int = 40, bad: int | None = None) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    batches = [torch.randn(16, 8, generator=draw) for _ in range(count)]
    if bad is not None:
        batches[bad][0, 0] = math.nan
    return batches


def train(module: LightningModule, batches: list[Tensor], *callbacks: Callback, **options: Any) -> None:
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), **{"limit_val_batches": 0, **options},
    )  # fmt: skip
    loader = DataLoader(batches, batch_size=None)
    trainer.fit(module, loader, loader if isinstance(module, Net) else None)


def seeded(*args: Any) -> Net:
    torch.manual_seed(0)
    return Net(*args)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeDriver]:
    """Has the learners of all fits lie on a fake device."""

    def install(when: When = "late", **options: Any) -> FakeDriver:
        device, driver = fake_device(when, **options)
        monkeypatch.setattr(trainer_context, "Learner", functools.partial(Learner, device=device))
        return driver

    return install


class Watch(Callback):
    """Compares each snapshot, once it is certified, with the state it was taken of."""

    def __init__(self, guard: NaNGuard, monkeypatch: pytest.MonkeyPatch) -> None:
        self.guard = guard
        self.expected: dict[int, tuple[int, Any]] = {}
        self.certified: set[tuple[int, int]] = set()
        self.torn: list[int] = []
        take = SnapshotManager.capture

        def capture(manager: SnapshotManager, *args: Any, **kwargs: Any) -> Any:
            snapshot = take(manager, *args, **kwargs)
            if snapshot is not None:
                self.expected[id(snapshot)] = snapshot.step, copied(dict(manager._learner.leaves()))
            return snapshot

        monkeypatch.setattr(SnapshotManager, "capture", capture)

    def on_train_batch_end(self, *args: Any) -> None:
        assert self.guard._fit is not None
        for snapshot in self.guard._fit.context.ring.certified:
            step, expected = self.expected[id(snapshot)]
            known = (id(snapshot), snapshot.step)
            if step == snapshot.step and known not in self.certified:
                self.certified.add(known)
                snapshot.wait()
                if not same_bits(snapshot.leaves, expected):
                    self.torn.append(snapshot.step)


class Swap(Callback):
    """Validates other weights in the place of the weights, while the device makes its copies."""

    def __init__(self, driver: FakeDriver, *, data: bool) -> None:
        self.driver, self.data, self.copied = driver, data, 0

    @torch.no_grad()
    def write(self, module: LightningModule, values: list[Tensor]) -> None:
        for parameter, value in zip(module.parameters(), values, strict=True):
            (parameter.data if self.data else parameter).copy_(value)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept = [parameter.detach().clone() for parameter in pl_module.parameters()]
        self.write(pl_module, [value / 2 for value in self.kept])
        self.copied += self.driver.finish()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write(pl_module, self.kept)


class ExtraStep(Callback):
    """Moves the weights right behind the guard, through ``.data``, as optimizers that step in backward do."""

    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        next(pl_module.parameters()).data.mul_(0.999)
        self.driver.finish()


@pytest.mark.parametrize("when", ["late", "random", "at once"])
@pytest.mark.parametrize("writes", ["nobody", "swap", "swap by data", "extra step"])
@pytest.mark.parametrize(("bad", "readback"), [(None, "deferred"), (20, "deferred"), (20, "step")])
def test_certified_snapshots_are_never_torn(
    when: When,
    writes: str,
    bad: int | None,
    readback: Any,
    on_device: Callable[..., FakeDriver],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each is bit for bit the state of its update, whoever writes to the weights while it is copied, and enough are."""
    driver = on_device(when)
    guard = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=2, snapshot_device="cpu", readback=readback)
    watch = Watch(guard, monkeypatch)
    others: dict[str, list[Callback]] = {
        "nobody": [],
        "swap": [Swap(driver, data=False)],
        "swap by data": [Swap(driver, data=True)],
        "extra step": [ExtraStep(driver)],
    }
    options = {"val_check_interval": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    train(seeded(), data(bad=bad), guard, *others[writes], watch, **(options if "swap" in writes else {}))
    assert watch.torn == []
    assert len(watch.certified) >= 5
    for one in others[writes]:
        if when == "late" and readback == "step" and isinstance(one, Swap):
            # With late readings, the check of the state before a validation waits for all copies.
            assert one.copied > 0, "copies were made while other weights were in place"
    assert [record.remedies for record in guard.interventions] == ([] if bad is None else [("skip",)])
    assert driver.released == 1


@pytest.mark.parametrize("when", ["late", "random"])
def test_a_healthy_run_is_the_same_on_a_late_device(
    when: When, on_device: Callable[..., FakeDriver], tmp_path: Path
) -> None:
    """Copies beside the run change nothing of it."""
    on_device(when)
    ends = []
    for guard in (
        None,
        NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=2, snapshot_device="cpu", readback="deferred"),
    ):
        module = seeded()
        train(module, data(), *([] if guard is None else [guard]))
        ends.append(copied(module.state_dict()))
    assert same_bits(*ends)


class Foreign(optim.Optimizer):
    """Says that it works with a GradScaler, and reads no ``found_inf``."""

    def __init__(self, parameters: Any, lr: float = 1e-2) -> None:
        super().__init__(parameters, {"lr": lr})
        self._step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scaler: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-group["lr"])
        return loss


class Own(optim.AdamW):
    """A subclass in the user's file."""


@pytest.mark.parametrize("make", [Foreign, Own, functools.partial(Own, fused=True)], ids=["foreign", "own", "fused"])
@pytest.mark.parametrize("readback", ["auto", "deferred"])
def test_an_optimizer_that_reads_no_flag_is_not_trusted_with_one(
    make: Any, readback: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad update is kept from the weights before the step, or is undone as one that was made."""
    monkeypatch.setattr(PendingReading, "arrived", lambda self: False)  # a device that is far behind
    guard, ends = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=4, readback=readback), Weights()
    train(seeded(make), data(bad=20), guard, ends)
    (record,) = guard.interventions
    assert ends.finite(-1)
    if readback == "auto":
        assert record.remedies == ("skip",)
        assert all(map(ends.finite, range(40)))
    else:
        assert "restore" in record.remedies
        assert not ends.finite(20), "it was made, and the record does not say otherwise"


class InfiniteLoss(Net):
    """One loss is infinite, and its gradient is finite."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + math.inf if batch_idx == 20 else loss


@pytest.mark.parametrize("make", [fused_adamw, Foreign], ids=["fused", "foreign"])
@pytest.mark.parametrize("readback", ["step", "deferred"])
def test_an_infinite_loss_with_a_finite_gradient_is_held_back_or_undone(
    make: Any, readback: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is recorded as skipped has not moved the weights; what has moved them is recorded as undone."""
    monkeypatch.setattr(PendingReading, "arrived", lambda self: False)
    guard, ends = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=4, readback=readback), Weights()
    torch.manual_seed(0)
    train(InfiniteLoss(make), data(), guard, ends)
    (record,) = guard.interventions
    moved = not same_bits(ends.seen[19], ends.seen[20])
    assert moved is ("restore" in record.remedies)
    assert moved is (make is Foreign and readback == "deferred")


class Captured(LightningModule):
    """Replays forward and backward like a captured graph, which writes to the same gradients each time."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.make = make
        self.net = nn.Linear(8, 1)
        self.places = [torch.zeros_like(parameter) for parameter in self.net.parameters()]

    def on_train_start(self) -> None:
        for parameter, place in zip(self.net.parameters(), self.places, strict=True):
            parameter.grad = place

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()
        for place, new in zip(self.places, torch.autograd.grad(loss, list(self.net.parameters())), strict=True):
            place.copy_(new)
        self.optimizers().step()

    def configure_optimizers(self) -> optim.Optimizer:
        return self.make(self.parameters(), lr=0.05)


@pytest.mark.parametrize(
    ("make", "readback"),
    [
        (optim.SGD, "step"),
        (Own, "step"),
        (functools.partial(optim.AdamW, fused=True), "deferred"),
        (optim.SGD, "deferred"),
    ],
    ids=["skip", "own", "flag", "rollback"],
)
def test_a_captured_graph_trains_on_after_a_bad_batch(make: Any, readback: Any, tmp_path: Path) -> None:
    """After a skip and after a rollback the gradients are where the graph writes them, and every update counts."""
    torch.manual_seed(0)
    guard, ends = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=4, readback=readback), Weights()
    module = Captured(make)
    train(module, data(bad=20), guard, ends)
    assert len(guard.interventions) == 1
    still = [i for i in range(1, 40) if same_bits(ends.seen[i - 1], ends.seen[i])]
    assert [i for i in still if i > 23] == []
    assert [id(p.grad) for p in module.net.parameters()] == [id(place) for place in module.places]
    assert ends.finite(-1)


@pytest.mark.parametrize("fails", ["device", "everywhere"])
def test_a_bad_batch_on_a_full_card_ends_no_run(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy that an unknown optimizer needs goes to the host, or is left out; the batch is skipped all the same."""
    real = skip.capture

    def full(*args: Any, device: torch.device | None = None, **options: Any) -> Any:
        if fails == "everywhere" or device is None:
            raise OutOfMemory("CUDA out of memory (emulated)")
        return real(*args, device=device, **options)

    monkeypatch.setattr(skip, "capture", full)
    guard, ends = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=4), Weights()
    train(seeded(Own), data(bad=20), guard, ends)
    assert [record.remedies for record in guard.interventions] == [("skip",)]
    assert same_bits(ends.seen[19], ends.seen[20])


def test_a_device_that_is_given_is_the_one_that_is_used() -> None:
    """Without one, a learner has a device of its own."""
    net = nn.Linear(2, 2)
    device, _ = fake_device()
    assert Learner(net, [], device=device).device is device
    assert isinstance(Learner(net, []).device, Device)


class Held(Callback):
    """Counts the batches that are alive while a backward pass runs."""

    def __init__(self) -> None:
        self.alive: list[weakref.ref[Tensor]] = []
        self.most = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Tensor, batch_idx: int) -> None:
        self.alive.append(weakref.ref(batch))

    def on_before_backward(self, *args: Any) -> None:
        self.alive = [one for one in self.alive if one() is not None]
        self.most = max(self.most, len(self.alive))


class Fresh(torch.utils.data.Dataset[Tensor]):
    """Makes each batch anew, so that nothing else keeps one alive."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Tensor:
        return data(1)[0] + index * 1e-3


@pytest.mark.parametrize(("most_bytes", "held"), [(1 << 30, 32), (5 * 16 * 8 * 4, 7), (0, 2)])
@pytest.mark.parametrize("readback", ["step", "deferred"])
def test_batches_that_are_kept_are_capped_in_bytes(most_bytes: int, held: int, readback: Any, tmp_path: Path) -> None:
    """Under accumulation in deferred readback, too: small batches are kept, large ones are not."""
    limits = BatchesThresholds(
        micro_batches=MicroBatchesThresholds(most_bytes=most_bytes),
        healthy=HealthyBatchesThresholds(most_bytes=0),
        repeated=RepeatedStepsThresholds(window_bytes=0, bytes_again=0),
    )
    seen = Held()
    guard = NaNGuard(
        readback=readback, dirpath=tmp_path, snapshot_every_n_steps=1000, thresholds=Thresholds(batches=limits)
    )
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[guard, seen], accumulate_grad_batches=8, limit_val_batches=0,
    )  # fmt: skip
    loader = DataLoader(Fresh(), batch_size=None)
    trainer.fit(seeded(), loader, loader)
    assert seen.most <= held


@pytest.mark.filterwarnings("ignore")  # of a package that is not ours
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
@pytest.mark.parametrize("bad", [None, 20])
def test_moments_of_few_bits_are_guarded(
    name: str, bad: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchao's moments are tensors that know few operations: a healthy run is the same, a bad batch is skipped."""
    optimizers = pytest.importorskip("torchao.optim")
    monkeypatch.setattr(torch, "compile", lambda function=None, **options: function or (lambda other: other))
    ends = []
    for guard in (None, NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=4)):
        torch.manual_seed(0)
        module = Net(getattr(optimizers, name))
        batches = [batch for i, batch in enumerate(data(bad=bad)) if guard is not None or i != bad]
        train(module, batches, *([] if guard is None else [guard]))
        ends.append(copied(module.state_dict()))
        if guard is not None:
            assert [record.remedies for record in guard.interventions] == ([] if bad is None else [("skip",)])
    assert same_bits(*ends)
