"""What holds on the CPU holds on one CUDA device: ``python -m pytest tests/gpu``; skipped where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_nanguard import NaNGuard
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.state.restore import restore
from lightning_nanguard.state.snapshot import capture
from tests.helpers import same_bits

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


class Net(LightningModule):
    """A small network with batch norm; one batch may be bad."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.net = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=self.fused)


class Momentum(Net):
    """The same, by SGD with momentum."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9, fused=self.fused)


class Adversarial(Net):
    """A GAN in small, whose generator runs once a batch."""

    def __init__(self, fused: bool) -> None:
        super().__init__(fused)
        self.automatic_optimization = False
        self.judge = nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        judging, making = self.optimizers()  # type: ignore[misc]
        made = self.net(batch)
        for optimizer, shown, wanted in ((judging, made.detach(), 0.0), (making, made, 1.0)):
            optimizer.zero_grad()
            self.manual_backward((self.judge(shown) - wanted).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:  # type: ignore[override]
        return [torch.optim.AdamW(part.parameters(), lr=1e-3, fused=self.fused) for part in (self.judge, self.net)]


def data(bad: int | None = None, without: int | None = None) -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    batches = [torch.randn(32, 16, generator=draw) for _ in range(40)]
    if bad is not None:
        batches[bad][0, 0] = float("nan")
    return [batch for index, batch in enumerate(batches) if index != without]


def train(
    batches: list[Tensor],
    fused: bool,
    guard: NaNGuard | None,
    callbacks: Sequence[Callback] = (),
    module: type[Net] = Net,
    **options: Any,
) -> dict[str, Any]:
    torch.manual_seed(0)
    net = module(fused)
    trainer = Trainer(
        max_epochs=1, accelerator="gpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*([] if guard is None else [guard]), *callbacks], **{"limit_val_batches": 0, **options},
    )  # fmt: skip
    loader = DataLoader(batches, batch_size=None)
    trainer.fit(net, loader, loader)
    state = trainer.optimizers[0].state_dict()["state"]
    return {"weights": net.state_dict(), "state": state, "loss": trainer.callback_metrics.get("loss_epoch")}


MODES = [("step", False), ("step", True), ("deferred", True), ("auto", True), ("auto", False)]


@pytest.mark.parametrize(("readback", "fused"), MODES)
def test_a_healthy_run_is_the_same(readback: Any, fused: bool, tmp_path: Path) -> None:
    """Weights, moments and logged means are bit-identical with and without the guard."""
    guard = NaNGuard(readback=readback, dirpath=tmp_path, snapshot_every_n_steps=4)
    assert same_bits(train(data(), fused, guard), train(data(), fused, None))
    assert len(guard.interventions) == 0


@pytest.mark.parametrize(("readback", "fused"), [mode for mode in MODES if mode != ("deferred", True)][:2])
def test_a_skip_is_bitwise(readback: Any, fused: bool, tmp_path: Path) -> None:
    """In step readback a bad batch might as well not have been there."""
    guard = NaNGuard(readback=readback, dirpath=tmp_path, snapshot_every_n_steps=4)
    assert same_bits(train(data(bad=20), fused, guard), train(data(without=20), fused, None))
    assert [record.remedies for record in guard.interventions] == [("skip",)]


@pytest.mark.parametrize("device", ["same", "cpu"])
@pytest.mark.parametrize(("readback", "fused"), [*MODES, ("deferred", False)])
def test_a_bad_batch_leaves_finite_state(readback: Any, fused: bool, device: Any, tmp_path: Path) -> None:
    """Whatever the readback and wherever the snapshots lie, the run ends finite."""
    guard = NaNGuard(readback=readback, dirpath=tmp_path, snapshot_every_n_steps=4, snapshot_device=device)
    ended = train(data(bad=20), fused, guard)
    tensors = [*ended["weights"].values(), *(value for entry in ended["state"].values() for value in entry.values())]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point())
    assert len(guard.interventions) == 1


def test_mixed_precision(tmp_path: Path) -> None:
    """fp16 with a GradScaler: a bad batch is skipped, ordinary overflows are left to the scaler."""
    guard = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=4)
    ended = train(data(bad=20), False, guard, precision="16-mixed")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in ended["weights"].values())
    assert [record.remedies for record in guard.interventions] == [("skip",)]


def test_momentum_that_a_skipped_step_would_have_begun(tmp_path: Path) -> None:
    """Fused SGD leaves uninitialised memory as momentum where its first step is skipped on the device: that one is
    read before it is made."""
    guard = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=4, readback="deferred")
    guarded = train(data(bad=0), True, guard, module=Momentum)
    never = train(data(without=0), True, None, module=Momentum)
    assert same_bits([guarded["weights"], guarded["state"]], [never["weights"], never["state"]])
    assert [record.remedies for record in guard.interventions] == [("skip",)]


def test_one_forward_that_two_optimizers_learn_from(tmp_path: Path) -> None:
    """That statistics are decided on behind the first step does not stand in the way of the second backward."""
    guard = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=4)
    assert same_bits(train(data(), True, guard, module=Adversarial), train(data(), True, None, module=Adversarial))
    assert len(guard.interventions) == 0


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.LBFGS])
def test_what_was_moved_comes_back_to_its_device(make: Any) -> None:
    """A snapshot in host memory puts back what an optimizer has forgotten, where it lay: tensors and lists of them."""
    net = nn.Linear(4, 4, device=DEVICE)
    optimizer = make(net.parameters())
    x = torch.randn(8, 4, device=DEVICE)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (net(x) - x).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    learner = Learner(net, [optimizer])
    taken = capture(learner, step=3, global_step=3, device=torch.device("cpu"))
    ended = []
    for forget in (False, True):
        if forget:
            optimizer.state.clear()
        restore(learner, taken)
        optimizer.step(closure)
        ended.append([parameter.detach().clone() for parameter in net.parameters()])
    assert same_bits(*ended)
