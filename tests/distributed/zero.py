"""What each rank runs of the tests of DeepSpeed: whole Trainer runs over gloo on the CPU."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from lightning_nanguard import NaNGuard
from tests.distributed.data import AT, spoilt, without
from tests.helpers import Task

STAGES = (1, 2, 3)


class OnCPU(DeepSpeedStrategy):
    """Lightning asks for CUDA, and DeepSpeed for the number of a device."""

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        from deepspeed.comm import torch as backend

        # It would compile an extension for reductions in shared memory.
        backend.build_shm_op = lambda: None
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)


def strategy(stage: int, **options: Any) -> OnCPU:
    return OnCPU(
        zero_optimization=stage > 0, stage=stage, logging_batch_size_per_gpu=8, reduce_bucket_size=10_000,
        allgather_bucket_size=10_000, **options,
    )  # fmt: skip


def tensors(trainer: Trainer, module: nn.Module) -> Iterator[Tensor]:
    """All of a rank that a step changes, found without the guard."""
    (zero,) = trainer.optimizers
    for parameter in module.parameters():
        yield getattr(parameter, "ds_tensor", parameter)
    flat: Any = getattr(zero, "fp32_partitioned_groups_flat", None)
    yield from zero.single_partition_of_fp32_groups if flat is None else flat
    for entry in zero.optimizer.state.values():
        yield from (value for value in entry.values() if isinstance(value, Tensor))


class InPartition(Callback):
    """Spoils a number of one rank's partition, or its loss."""

    hits = 0

    def __init__(self, rank: int, place: str, value: float = math.nan, at: int = AT) -> None:
        self.rank, self.place, self.value, self.at = rank, place, value, at

    def _now(self, trainer: Trainer, batch_idx: int) -> bool:
        return trainer.global_rank == self.rank and batch_idx == self.at

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.armed = self._now(trainer, batch_idx)
        pl_module.loss_factor = self.value if self.armed and self.place == "loss" else None

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        if self.armed and self.place == "gradient":
            self._spoil(trainer.optimizers[0].averaged_gradients[0])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self._now(trainer, batch_idx + 1) or self.place in ("loss", "gradient"):
            return
        (zero,) = trainer.optimizers
        if self.place == "moment":
            self._spoil(entry["exp_avg_sq"] for entry in zero.optimizer.state.values())
        elif self.place == "buffer":
            self._spoil(buffer for name, buffer in pl_module.named_buffers() if "running_var" in name)
        elif self.place == "weight":
            self._spoil(p.ds_tensor if hasattr(p, "ds_tensor") else p for p in pl_module.parameters())
        else:
            flat = getattr(zero, "fp32_partitioned_groups_flat", None)
            self._spoil(zero.single_partition_of_fp32_groups if flat is None else flat)

    def _spoil(self, found: Any) -> None:
        with torch.no_grad():
            next(one for one in found if one.numel() > 0).view(-1)[0] = self.value


def made(optimizer: Any = None) -> Task:
    torch.manual_seed(3)
    return Task(nn.Sequential(nn.Linear(6, 100), nn.BatchNorm1d(100), nn.Tanh(), nn.Linear(100, 2)), optimizer)


def zero(worker: Any) -> None:
    """Each stage."""
    for stage in STAGES:
        one_stage(worker, stage)


def one_stage(worker: Any, stage: int) -> None:
    def fit(name: str, *callbacks: Callback, **options: Any) -> Any:
        options.setdefault("strategy", strategy(stage))
        return worker.fit(f"{stage} {name}", made(options.pop("optimizer", None)), *callbacks, **options)

    fit("healthy")
    fit("bare", guarded=False)
    fit("without", guarded=False, data=without(AT))
    fit("without window", guarded=False, data=without(AT - 1, AT), accumulate_grad_batches=2)
    for rank in range(worker.world):
        fit(f"sample {rank}", data=spoilt(rank))
        fit(f"spike {rank}", InPartition(rank, "loss", 1e12))
        for place in ("loss", "gradient", "weight", "master"):
            fit(f"{place} {rank}", InPartition(rank, place))
        fit(f"moment {rank}", InPartition(rank, "moment", math.inf))
        fit(f"buffer {rank}", InPartition(rank, "buffer"))
        fit(f"accumulated {rank}", InPartition(rank, "loss", at=AT - 1), accumulate_grad_batches=2)
