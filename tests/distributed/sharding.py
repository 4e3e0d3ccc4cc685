"""What each rank runs for ``test_sharded.py``: Trainer fits under FSDP and ``fully_shard``, over gloo on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_nanguard import NaNGuard
from lightning_nanguard.measure.tensors import local
from lightning_nanguard.record.files import LAST_GOOD
from tests.distributed.data import AT, spoilt, without
from tests.distributed.further import further, healthy
from tests.helpers import Task, TwoOptimizers

KINDS = ("fsdp2", "fsdp1")


class OnCPU(FSDPStrategy):
    """Lightning asks for CUDA where the class is FSDPStrategy itself; torch asks for a device."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(
            model, sharding_strategy=self.sharding_strategy, device_id=torch.device("cpu"), **self.kwargs
        )


class Sharded(Task):
    """A task whose layers are sharded by ``fully_shard``, where the strategy has a mesh."""

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]
            for layer in (self.net[0], self.net[3], self.net):
                fully_shard(layer, mesh=mesh)


class TwoSharded(TwoOptimizers):
    """Manual optimization with two optimizers, each of whose layers is sharded."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        for layer in (*(one for one in self.net if isinstance(one, nn.Linear)), self.net):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def made(optimizer: Any = None, kind: type[Task] = Sharded) -> Task:
    torch.manual_seed(3)
    return kind(nn.Sequential(nn.Linear(6, 100), nn.BatchNorm1d(100), nn.Tanh(), nn.Linear(100, 2)), optimizer)


def strategy(kind: str, world: int, *, whole: bool = True) -> Any:
    """The strategy of a kind, saving one whole file or a folder of shards."""
    if kind == "fsdp2":
        return ModelParallelStrategy(world, 1, save_distributed_checkpoint=not whole)
    return OnCPU(auto_wrap_policy={nn.Linear}, state_dict_type="full" if whole else "sharded")


class InShard(Callback):
    """Spoils a number of one rank's shard, or its loss."""

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
            self._spoil([p.grad for p in pl_module.parameters() if p.grad is not None])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._now(trainer, batch_idx + 1) and self.place in ("weight", "moment", "buffer"):
            (optimizer,) = trainer.optimizers
            moments = [entry["exp_avg_sq"] for entry in optimizer.state.values()]
            buffers = [buffer for name, buffer in pl_module.named_buffers() if "running_var" in name]
            self._spoil({"weight": pl_module.parameters(), "moment": moments, "buffer": buffers}[self.place])

    def _spoil(self, tensors: Any) -> None:
        with torch.no_grad():
            next(mine for one in tensors if (mine := local(one.detach())).numel() > 0).view(-1)[0] = self.value


def sharded(worker: Any) -> None:
    """Each fault on each rank, saves of both layouts, and going on from them."""
    for kind in KINDS:
        one_kind(worker, kind)


def one_kind(worker: Any, kind: str) -> None:
    def fit(name: str, *callbacks: Callback, whole: bool = True, **options: Any) -> Any:
        options.setdefault("strategy", strategy(kind, worker.world, whole=whole))
        module = options.pop("module", None) or made(options.pop("optimizer", None))
        return worker.fit(f"{kind} {name}", module, *callbacks, **options)

    healthy(worker, f"{kind} ", fit)
    fit("without", guarded=False, data=without(AT))
    fit("without window", guarded=False, data=without(AT - 1, AT), accumulate_grad_batches=2)
    for rank in range(worker.world):
        fit(f"sample {rank}", data=spoilt(rank))
        evident = NaNGuard(snapshot_every_n_steps=2, act_on="evidence")
        fit(f"spike {rank}", InShard(rank, "loss", 1e12), guard=evident)
        for place in ("loss", "gradient", "weight"):
            fit(f"{place} {rank}", InShard(rank, place))
        fit(f"moment {rank}", InShard(rank, "moment", math.inf))
        fit(f"buffer {rank}", InShard(rank, "buffer"))
        fit(f"accumulated {rank}", InShard(rank, "loss", at=AT - 1), accumulate_grad_batches=2)
    for place in ("loss", "gradient", "weight"):
        late = NaNGuard(readback="deferred", snapshot_every_n_steps=2)
        fit(f"deferred {place}", InShard(1, place), guard=late)
    fit("diverged", optimizer=lambda parameters: torch.optim.SGD(parameters, lr=50.0), max_epochs=3)
    fit("observed", InShard(1, "loss"), guard=NaNGuard(observe=True))
    further(fit, made, Sharded)
    if kind == "fsdp2":
        torch.manual_seed(3)
        fit("manual", InShard(1, "loss"), module=TwoSharded())
    # Of FSDP1 torch cannot collect a whole file on the CPU, with a guard or without: it reads memory that it has freed.
    for whole in (True, False) if kind == "fsdp2" else (False,):
        layout = "whole" if whole else "shards"
        for rank in range(worker.world):
            fault, name = InShard(rank, "weight"), f"saved {layout} {rank}"
            saved(worker, f"{kind} {name}", partial(fit, name, fault, whole=whole), holds_only_numbers)
        saved_within(worker, f"{kind} within {layout}", partial(fit, f"within {layout}", whole=whole))
        goes_on(worker.folder / f"{kind} {layout}", layout, partial(fit, whole=whole))


def saved(worker: Any, name: str, fit: Any, good: Callable[[Path], bool]) -> None:
    """A checkpoint when a weight has just been lost, and the last good one.

    Args:
        worker: The rank.
        name: Of the fit.
        fit: Makes it, with the fault.
        good: Whether a checkpoint holds no NaN and no Inf.
    """
    place = worker.folder / name
    each = ModelCheckpoint(place / "checkpoints", every_n_train_steps=AT, save_top_k=-1)
    guard = NaNGuard(snapshot_every_n_steps=2, dirpath=place / "nanguard", last_good_every_n_steps=3)
    fit(each, guard=guard, enable_checkpointing=True)
    dist.barrier()  # rank 0 may be moving the last good one
    files = sorted(place.rglob("*.ckpt"))
    worker.results[name] |= {
        "files": len(files),
        "bad": [file.name for file in files if not good(file)],
        "kept": good(place / "nanguard" / LAST_GOOD),
    }


class SaveWithin(Callback):
    """Saves in mid-batch, when a weight has gone bad."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        if trainer.fit_loop.epoch_loop.batch_idx == AT:
            trainer.save_checkpoint(self.path)


def saved_within(worker: Any, name: str, fit: Any) -> None:
    """One checkpoint, written when a weight has gone bad and the batch is under way."""
    save = SaveWithin(worker.folder / f"{name}.ckpt")
    fit(InShard(1, "weight"), save)
    worker.results[name]["saved"] = holds_only_numbers(save.path)


def goes_on(place: Path, layout: str, fit: Any) -> None:
    """A second epoch from what the first one left, with the guard and without."""
    each = ModelCheckpoint(place, every_n_epochs=1, save_top_k=-1)
    fit(f"first epoch {layout}", each, enable_checkpointing=True)
    (first,) = place.glob("epoch=0*")
    fit(f"resumed {layout}", max_epochs=2, ckpt_path=first)
    fit(f"resumed bare {layout}", max_epochs=2, ckpt_path=first, guarded=False)
    # What a run without the guard leaves of a weight that is lost.
    each = ModelCheckpoint(place / "bare", every_n_epochs=1, save_top_k=-1)
    fit(f"lost {layout}", InShard(1, "weight"), each, enable_checkpointing=True, guarded=False)
    (lost,) = (place / "bare").glob("epoch=0*")
    fit(f"refused {layout}", max_epochs=2, ckpt_path=lost)


def holds_only_numbers(checkpoint: Path) -> bool:
    """Whether no tensor of a checkpoint, a file or a folder, holds NaN or Inf."""
    content: Any = {}
    if checkpoint.is_dir():
        from torch.distributed.checkpoint import FileSystemReader
        from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
        from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

        reader = FileSystemReader(checkpoint)
        _load_state_dict(content, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    else:
        content = torch.load(checkpoint, weights_only=True)
        content = [content["state_dict"], content["optimizer_states"]]
    tensors = [leaf for leaf in tree_leaves(content) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return bool(tensors) and all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
