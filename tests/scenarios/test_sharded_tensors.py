"""DTensors among the parameters and buffers of a run on one device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader

from lightning_nanguard import NaNGuard
from tests.helpers import batches, differences, mlp, trainer_for

pytest.importorskip("torch.distributed.tensor")  # since torch 2.5

from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """One process, which keeps all of a sharded tensor."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


class Sharded(LightningModule):
    """Has a trained and a frozen DTensor, and one as a buffer; NaN strikes the trained one."""

    def __init__(self, mesh: DeviceMesh, struck: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.struck = mlp(), struck
        self.trained, self.frozen, table = (distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]) for _ in range(3))
        self.trained, self.frozen = nn.Parameter(self.trained), nn.Parameter(self.frozen, requires_grad=False)
        self.register_buffer("table", table)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.struck:
            self.trained.data.to_local()[0] = math.nan

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean() + self.trained.to_local().square().mean()

    def configure_optimizers(self) -> Optimizer:
        return SGD(self.parameters(), lr=0.01, momentum=0.9)


def run(mesh: DeviceMesh, guard: NaNGuard | None, struck: int | None = None) -> dict[str, Tensor]:
    module = Sharded(mesh, struck)
    trainer_for(None, guard).fit(module, DataLoader(batches(count=24), batch_size=None))
    parts = module.state_dict().items()
    return {name: part.to_local() if isinstance(part, DTensor) else part for name, part in parts}


@pytest.mark.parametrize("readback", ["step", "deferred"])
@pytest.mark.parametrize("act_on", ["certain", "evidence"])
def test_a_healthy_run_is_left_alone_and_a_lost_weight_comes_back(
    mesh: DeviceMesh, act_on: Any, readback: Any, tmp_path: Path
) -> None:
    """The same bits as without the guard, also with a weight lost: it is restored, and its updates are made again."""
    healthy, struck = (
        NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=5, act_on=act_on, readback=readback) for _ in range(2)
    )
    bare = run(mesh, None)
    assert differences(run(mesh, healthy), bare) == []
    assert list(healthy.interventions) == []
    assert differences(run(mesh, struck, 15), bare) == []
    assert [one.remedies for one in struck.interventions] == [("restore", "redo")]
