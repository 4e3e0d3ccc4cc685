"""What each rank runs for ``test_deepspeed.py``: Trainer fits under DeepSpeed's ZeRO, over gloo on the CPU."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_nanguard import NaNGuard
from lightning_nanguard.record.files import LAST_GOOD
from tests.distributed.data import AT, spoilt, without
from tests.distributed.further import further, healthy
from tests.distributed.sharding import SaveWithin, saved
from tests.helpers import Lookahead, Task

# Stage and precision of each kind.
KINDS = {"zero1": (1, "32-true"), "zero2": (2, "bf16-true"), "zero3": (3, "32-true"), "zero3 mixed": (3, "bf16-mixed")}
PLACES = ("sample", "loss", "spike", "gradient", "weight", "partition", "moment", "buffer")
# Among ranks; of stage 1 only what differs from stage 2.
AMONG = {"zero1": ("loss", "gradient", "partition"), "zero2": PLACES, "zero3": PLACES}


class OnCPU(DeepSpeedStrategy):
    """Lightning asks for CUDA, and DeepSpeed for the number of a device."""

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        # It would compile an extension for reductions in shared memory.
        import_module("deepspeed.comm.torch").build_shm_op = lambda: None
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)


def strategy(stage: int) -> OnCPU:
    """The strategy, with buffers for a small model; in stage 3 its largest parameter alone is not kept whole."""
    buckets = {"reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000}
    made = OnCPU(stage=stage, logging_batch_size_per_gpu=8, **buckets)
    made.config["zero_optimization"]["stage3_param_persistence_threshold"] = 300
    return made


def partitions(zero: Any) -> list[Tensor]:
    """What a rank's optimizer steps."""
    flat = getattr(zero, "fp32_partitioned_groups_flat", None)
    return list(zero.single_partition_of_fp32_groups if flat is None else flat)


def tensors(trainer: Trainer, module: nn.Module) -> Iterator[Tensor]:
    """All of a rank that a step changes, found without the guard."""
    (zero,) = trainer.optimizers
    for parameter in module.parameters():
        yield getattr(parameter, "ds_tensor", parameter)
    yield from partitions(zero)
    for entry in zero.optimizer.state.values():
        yield from (value for value in entry.values() if isinstance(value, Tensor))


class InPartition(Callback):
    """Spoils a number of one rank's partition, or its loss."""

    hits = 0

    def __init__(self, rank: int, place: str, at: int = AT) -> None:
        self.rank, self.at = rank, at
        self.place = "loss" if place == "spike" else place
        self.value = {"spike": 1e12, "moment": math.inf}.get(place, math.nan)

    def _now(self, trainer: Trainer, batch_idx: int) -> bool:
        return trainer.global_rank == self.rank and batch_idx == self.at

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.armed = self._now(trainer, batch_idx)
        pl_module.loss_factor = self.value if self.armed and self.place == "loss" else None

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        if self.armed and self.place == "gradient":
            self._spoil(trainer.optimizers[0].averaged_gradients[0])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self._now(trainer, batch_idx + 1):
            return
        (zero,) = trainer.optimizers
        if self.place == "weight":
            self._spoil(getattr(parameter, "ds_tensor", parameter) for parameter in pl_module.parameters())
        elif self.place == "partition":
            self._spoil(partitions(zero))
        elif self.place == "moment":
            self._spoil(entry["exp_avg_sq"] for entry in zero.optimizer.state.values())
        elif self.place == "buffer":
            self._spoil(buffer for name, buffer in pl_module.named_buffers() if "running_var" in name)

    def _spoil(self, found: Any) -> None:
        with torch.no_grad():
            next(one for one in found if one.numel() > 0).view(-1)[0] = self.value


class Manual(Task):
    """Manual optimization, with the one optimizer that DeepSpeed allows."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch, "loss"))
        optimizer.step()


def made(optimizer: Any = None, kind: type[Task] = Task, norm: type[nn.Module] = nn.BatchNorm1d) -> Task:
    torch.manual_seed(3)
    return kind(nn.Sequential(nn.Linear(6, 100), norm(100), nn.Tanh(), nn.Linear(100, 2)), optimizer)


def zero(worker: Any) -> None:
    """Each fault on each rank, saves, and going on from them, in every stage."""
    for kind in AMONG:
        one_kind(worker, kind)


def zero_alone(worker: Any) -> None:
    """One process, whose partitions are whole."""
    for kind in KINDS:
        fit = partial(fit_of, worker, kind)
        fit("healthy")
        fit("bare", guarded=False)
        fit("without", guarded=False, data=without(AT))
        fit("loss", InPartition(0, "loss"))
        fit("weight", InPartition(0, "weight"), guard=NaNGuard(snapshot_every_n_steps=1000))
        ahead = partial(Lookahead, lr=0.1)  # it moves weights in every third step
        fit("looking ahead", InPartition(0, "loss", at=8), optimizer=ahead)
        fit("looking ahead without", guarded=False, optimizer=ahead, data=without(8))
        fit("without all", guarded=False, data=without(*range(AT + 1)))
        clipped(worker, f"{kind}: clipped", fit)
        slowed(fit)
        saved_within(worker, kind, fit)
        fit("manual", InPartition(0, "loss"), task=Manual)
        fit("manual without", guarded=False, task=Manual, data=without(AT))


def fit_of(worker: Any, kind: str, name: str, *callbacks: Callback, **options: Any) -> Any:
    """One fit of a kind."""
    stage, precision = KINDS[kind]
    options = {"strategy": strategy(stage), "precision": precision, **options}
    # Under DeepSpeed's mixed precision batch norm fails by itself.
    norm = nn.LayerNorm if precision == "bf16-mixed" else nn.BatchNorm1d
    module = options.pop("module", None) or made(options.pop("optimizer", None), options.pop("task", Task), norm)
    return worker.fit(f"{kind}: {name}", module, *callbacks, **options)


def one_kind(worker: Any, kind: str) -> None:
    fit = partial(fit_of, worker, kind)
    healthy(worker, f"{kind}: ", fit)
    fit("without", guarded=False, data=without(AT))
    fit("without window", guarded=False, data=without(AT - 1, AT), accumulate_grad_batches=2)
    for rank in range(worker.world):
        for place in AMONG[kind]:
            evident = {"guard": NaNGuard(snapshot_every_n_steps=2, act_on="evidence")} if place == "spike" else {}
            data = spoilt(rank) if place == "sample" else None
            fit(f"{place} {rank}", InPartition(rank, place), data=data, **evident)
        fit(f"accumulated {rank}", InPartition(rank, "loss", at=AT - 1), accumulate_grad_batches=2)
        lost, name = InPartition(rank, "weight"), f"saved {rank}"
        saved(worker, f"{kind}: {name}", partial(fit, name, lost), holds_only_numbers)
    if kind != "zero1":
        goes_on(worker.folder / kind, fit)
    if kind == "zero3":
        for place in ("loss", "gradient", "weight"):
            late = NaNGuard(readback="deferred", snapshot_every_n_steps=2)
            fit(f"deferred {place}", InPartition(1, place), guard=late)
        fit("diverged", optimizer=lambda parameters: torch.optim.SGD(parameters, lr=50.0), max_epochs=3)
        fit("observed", InPartition(1, "loss"), guard=NaNGuard(observe=True))
        clipped(worker, f"{kind}: clipped", fit)
        saved_within(worker, kind, fit)
        further(fit, made, Task)
    never_seen(worker, kind, fit)


def never_seen(worker: Any, kind: str, fit: Any) -> None:
    """What a run leaves that never saw the batches which a rollback has lost."""
    lost = {
        (record["snapshot_step"], result["acted_in"][0])
        for name, result in worker.results.items()
        for record in result["records"]
        if name.startswith(f"{kind}: ") and name.split()[1] in AMONG[kind] and record["remedies"] == ["restore"]
    }
    for step, batch in sorted(lost):
        fit(f"without {step} to {batch}", guarded=False, data=without(*range(step, batch + 1)))


class Slow(Callback):
    """Has the guard halve the learning rate from the start."""

    def __init__(self, guard: NaNGuard) -> None:
        self.guard = guard

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.guard._fit.context.rate.set_multiplier(0.5)


def slowed(fit: Any) -> None:
    """The guard's multiplier, and the same rate without it, in two groups."""

    def groups(rate: float) -> Any:
        def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            body, head = parameters[:-2], parameters[-2:]
            return torch.optim.AdamW([{"params": body}, {"params": head, "lr": 3 * rate}], lr=rate)

        return optimizer

    guard = NaNGuard(snapshot_every_n_steps=2)
    fit("slowed", InPartition(0, "loss"), Slow(guard), guard=guard, optimizer=groups(0.01))
    fit("slow", guarded=False, optimizer=groups(0.005), data=without(AT))


class ClipAlways(Callback):
    """Has the guard clip from the start, and keeps the norms that DeepSpeed then finds by itself."""

    def __init__(self, guard: NaNGuard, value: float) -> None:
        self.guard, self.value = guard, value
        self.norms: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.guard._fit.guard._parts.recovery.clip(self.value, "norm")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.norms.append(float(trainer.strategy.deepspeed_engine.get_global_grad_norm()))


def clipped(worker: Any, name: str, fit: Any) -> None:
    """The guard clips."""
    guard = NaNGuard()
    clip = ClipAlways(guard, 1e-2)
    fit("clipped", clip, guard=guard)
    worker.results[name]["norms"] = clip.norms


class SaveDirectly(SaveWithin):
    """Saves through the strategy, which writes the state of the engine whatever it is given."""

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        if trainer.fit_loop.epoch_loop.batch_idx == AT:
            trainer.strategy.save_checkpoint({"mine": 1}, self.path)


def saved_within(worker: Any, kind: str, fit: Any) -> None:
    """A checkpoint, written when a weight has gone bad and the batch is under way."""
    for name, way in (("within", SaveWithin), ("within, directly", SaveDirectly)):
        save = way(worker.folder / f"{kind}: {name}.ckpt")
        fit(name, InPartition(worker.world - 1, "weight"), save)
        worker.results[f"{kind}: {name}"]["saved"] = holds_only_numbers(save.path)


def goes_on(place: Path, fit: Any) -> None:
    """A second epoch from what the first one left, with the guard and without."""
    each = ModelCheckpoint(place, every_n_epochs=1, save_top_k=-1)
    fit("first epoch", each, enable_checkpointing=True)
    (first,) = place.glob("epoch=0*")
    fit("resumed", max_epochs=2, ckpt_path=first)
    fit("resumed bare", max_epochs=2, ckpt_path=first, guarded=False)
    good = place.parent / f"{place.name}: saved 1" / "nanguard" / LAST_GOOD
    fit("from last good", ckpt_path=good)
    fit("from last good bare", ckpt_path=good, guarded=False)
    # What a run without the guard leaves of a partition that is lost.
    each = ModelCheckpoint(place / "bare", every_n_epochs=1, save_top_k=-1)
    fit("lost", InPartition(1, "partition"), each, enable_checkpointing=True, guarded=False)
    (lost,) = (place / "bare").glob("epoch=0*")
    fit("refused", max_epochs=2, ckpt_path=lost)


def holds_only_numbers(checkpoint: Path) -> bool:
    """Whether no tensor in the files of a checkpoint holds NaN or Inf."""
    names = {
        "deepspeed.runtime.fp16.loss_scaler": ("LossScaler",),
        "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
        "deepspeed.utils.tensor_fragment": ("fragment_address",),
    }
    known = [getattr(import_module(module), name) for module, found in names.items() for name in found]
    with torch.serialization.safe_globals(known):
        content = [torch.load(file, weights_only=True) for file in sorted(checkpoint.rglob("*.pt"))]
    content = [[file.get("module"), file.get("optimizer_state_dict")] for file in content]
    found = [leaf for leaf in tree_leaves(content) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return bool(found) and all(bool(torch.isfinite(tensor).all()) for tensor in found)
