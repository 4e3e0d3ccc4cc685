"""Skips in mid-run where gradients live in memory of somebody else: buckets, flat parameters, compiled graphs."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn, optim
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader

from lightning_nanguard import NaNGuard
from lightning_nanguard.guard.build import guard_for
from lightning_nanguard.guard.context import Settings
from tests.guard.plain_loop import PlainLoop
from tests.helpers import copied, same_bits

COUNT, BAD = 24, 12


class Net(LightningModule):
    """A small network; some batches may be passed over, as if they had not been there."""

    def __init__(self, mode: str | None = None) -> None:
        super().__init__()
        net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
        self.net: Any = net if mode is None else torch.compile(net, backend=mode)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.AdamW(self.parameters(), lr=1e-2)


def batches(*, bad: bool) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    made = [torch.randn(16, 8, generator=draw) for _ in range(COUNT)]
    if not bad:
        return [batch for index, batch in enumerate(made) if index != BAD]
    made[BAD][0, 0] = math.nan
    return made


def train(module: LightningModule, data: list[Tensor], guard: NaNGuard | None, **options: Any) -> Any:
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[] if guard is None else [guard], **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=None))
    return copied(module.state_dict())


def seeded(*args: Any) -> Net:
    torch.manual_seed(0)
    return Net(*args)


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one, for what needs one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def checked(guard: NaNGuard, ended: Any, without: Any) -> None:
    assert [record.remedies for record in guard.interventions] == [("skip",)]
    assert same_bits(ended, without)


@pytest.mark.usefixtures("group")
def test_bucket_views_of_ddp(tmp_path: Path) -> None:
    """Gradients that are views of DDP's buckets: a skipped batch might as well not have been there."""

    def ddp() -> DDPStrategy:
        return DDPStrategy(gradient_as_bucket_view=True, process_group_backend="gloo")

    guard = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=4)
    ended = train(seeded(), batches(bad=True), guard, strategy=ddp(), use_distributed_sampler=False)
    without = train(seeded(), batches(bad=False), None, strategy=ddp(), use_distributed_sampler=False)
    checked(guard, ended, without)


@pytest.mark.filterwarnings("ignore")  # the compiler has its own
@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
def test_compiled_graphs(mode: str, tmp_path: Path) -> None:
    """A compiled module trains on after a skip; ``tests/gpu`` has ``reduce-overhead``, which needs a card."""
    guard = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=4)
    ended = train(seeded(mode), batches(bad=True), guard)
    without = train(seeded(mode), batches(bad=False), None)
    checked(guard, ended, without)


class Flat(PlainLoop):
    """Trains a network whose parameters FSDP keeps in one flat one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
        self.net = FullyShardedDataParallel(net, device_id=torch.device("cpu"))  # type: ignore[assignment]
        self.optimizer = optim.AdamW(self.net.parameters(), lr=1e-2)  # type: ignore[assignment]
        settings = Settings(snapshot_every=4)
        self.guard = guard_for(self.net, [self.optimizer], self, replay=self, settings=settings)

    @property
    def flat(self) -> Tensor:
        (flat,) = self.net.parameters()
        return flat.detach()


@pytest.mark.filterwarnings("ignore")  # torch's own, of a strategy that is meant for devices
@pytest.mark.usefixtures("group")
def test_flat_parameters_of_fsdp() -> None:
    """The one flat gradient comes back after a skip, and training goes on as if the batch had not been there."""

    def spoil(step: int, batch: Tensor) -> None:
        if step == BAD:
            batch[0, 0] = math.nan

    guarded, without = Flat(), Flat()
    guarded.run(COUNT, spoil)
    without.run(COUNT, without=BAD)
    assert [record.remedies for record in guarded.records] == [("skip",)]
    assert same_bits(guarded.flat, without.flat)
