"""What each rank of a multi-process test runs: a suite, which is many Trainer fits in a row.

A suite is one function that takes a :class:`Worker`. Ranks are forked (:func:`forked`), or started as a script or by
spawn (``python -m tests.distributed.worker OUT WORLD STRATEGY SUITE``) or by torchrun. Each rank writes what it saw of
each fit to ``OUT/rank<r>.json``, and the tests in ``test_ddp.py``, ``test_sharded.py``, ``test_deepspeed.py`` and
``test_saves.py`` assert on that. Suites start processes once, since that takes seconds and a fit does not.
"""

from __future__ import annotations

import faulthandler
import gc
import hashlib
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_nanguard import NaNGuard
from lightning_nanguard.distributed.group import Group
from lightning_nanguard.measure.tensors import local
from lightning_nanguard.trainer import context as trainer_context
from tests.distributed.again import again, apart, mistaken
from tests.distributed.data import AT, STEPS, far_off, spoilt, without
from tests.distributed.further import NaNRate, NaNValidation
from tests.distributed.plain import plain
from tests.distributed.saving import saves
from tests.distributed.sharding import sharded
from tests.distributed.trials import trials
from tests.distributed.zero import tensors, zero, zero_alone
from tests.helpers import FaultAt, Task, batches, learner_of, mlp, task, trainer_for


class OnRank(FaultAt):
    """A fault on one rank only."""

    def __init__(self, rank: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rank = rank

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if trainer.global_rank != self.rank:
            self.steps = set()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.kind == "gradient" and self._undo is not None:
            self._undo()  # what is spoilt before the all-reduce would be spoilt on every rank
            self._undo = None

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        if self.armed and self.kind == "gradient":
            self.armed = False
            gradient = next(p.grad for p in pl_module.parameters() if p.grad is not None)
            gradient.copy_(self._spoiled(gradient))


class AfterInterventions(Callback):
    """A fingerprint of parameters and moments after every batch in which the guard acted."""

    def __init__(self, guard: NaNGuard) -> None:
        self.guard = guard
        self.seen = 0
        self.prints: list[str] = []
        self.batches: list[int] = []
        self.by_step: dict[int, str] = {}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.by_step[trainer.global_step] = fingerprint(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = fingerprint(trainer, pl_module)
        self.by_step.setdefault(trainer.global_step, now)
        if len(self.guard.interventions) > self.seen:
            self.seen = len(self.guard.interventions)
            self.prints.append(now)
            self.batches.append(batch_idx)


def fingerprint(trainer: Trainer, module: Any) -> str:
    """Of every bit of parameters and optimizer state."""
    digest = hashlib.sha256()
    for tensor in replicated_tensors(trainer, module):
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def replicated_tensors(trainer: Trainer, module: Any) -> Iterator[Tensor]:
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        yield from tensors(trainer, module)
        return
    state = learner_of(trainer, module)
    yield from map(local, state["parameters"].values())
    for optimizer in state["optimizers"]:
        for entry in optimizer["state"].values():
            yield from (local(value) for value in entry.values() if isinstance(value, Tensor))


def finite(trainer: Trainer, module: Any) -> bool:
    tensors = [*replicated_tensors(trainer, module), *module.buffers()]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point())


class Said(logging.Handler):
    """Keeps what the guard says in a fit."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        logging.getLogger("lightning_nanguard").setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Worker:
    """One rank: runs fits and keeps what it saw of each.

    Args:
        folder: Where results go.
        world: Number of ranks.
        strategy: Lightning's name of the strategy.
    """

    def __init__(self, folder: Path, world: int, strategy: str) -> None:
        self.folder, self.world, self.strategy = folder, world, strategy
        self.results: dict[str, Any] = {}

    def fit(
        self,
        name: str,
        module: Task | None = None,
        *callbacks: Callback,
        data: Callable[[int], list[Any]] | None = None,
        guard: NaNGuard | None = None,
        guarded: bool = True,
        ckpt_path: Path | None = None,
        **options: Any,
    ) -> tuple[Trainer, Task]:
        """One fit, each rank on data of its own; what is left of it is kept under ``name``."""
        module = module or task("mlp")
        if guard is None and guarded:
            guard = NaNGuard(snapshot_every_n_steps=2)
        watch = [AfterInterventions(guard)] if guard is not None else []
        options.setdefault("strategy", DDPStrategy(start_method="spawn") if self.spawned else "ddp")
        trainer = trainer_for(
            self.folder, guard, [*callbacks, *watch], devices=self.world, use_distributed_sampler=False, **options
        )
        torch.manual_seed(1)
        rank = trainer.global_rank
        made = data(rank) if data is not None else batches(count=STEPS, seed=rank)
        loader = DataLoader(made, batch_size=None)
        val = DataLoader(batches(count=2, seed=50 + rank), batch_size=None)
        error, said = None, Said()
        logging.getLogger("lightning_nanguard").addHandler(said)
        try:
            trainer.fit(module, loader, val, ckpt_path=ckpt_path)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
            traceback.print_exc()
        logging.getLogger("lightning_nanguard").removeHandler(said)
        self.results[name] = {
            "records": [record.to_dict() for record in guard.interventions] if guard is not None else [],
            "after": watch[0].prints if watch else [],
            "acted_in": watch[0].batches if watch else [],
            "by_step": watch[0].by_step if watch else {},
            "end": fingerprint(trainer, module),
            "finite": finite(trainer, module),
            "steps": trainer.global_step,
            "batches": len(made),
            "lr_multiplier": guard.lr_multiplier if guard is not None else 1.0,
            "error": error,
            "said": said.lines,
            "hits": sum(callback.hits for callback in callbacks if isinstance(callback, FaultAt)),
        }
        return trainer, module

    @property
    def spawned(self) -> bool:
        return self.strategy == "ddp_spawn"

    def write(self) -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        (self.folder / f"rank{rank}.json").write_text(json.dumps(self.results))


def faults(worker: Worker) -> None:
    """Each fault on each rank."""
    worker.fit("healthy")
    worker.fit("bare", guarded=False)
    worker.fit("without", guarded=False, data=without(AT))
    worker.fit("window", guarded=False, accumulate_grad_batches=2)
    for rank in range(worker.world):
        one_rank(worker, rank)


def one_rank(worker: Worker, rank: int) -> None:
    """One of each kind, in each place."""
    nan, inf = float("nan"), float("inf")

    def fit(name: str, *fault: Any, module: str = "mlp", **options: Any) -> None:
        callbacks = [OnRank(rank, *fault)] if fault else []
        worker.fit(f"{name} {rank}", task(module), *callbacks, **options)

    fit("sample", data=spoilt(rank))
    fit("loss", "loss", nan, AT)
    fit("infinite", "loss", inf, AT)
    fit("spike", "loss", 1e12, AT, guard=NaNGuard(snapshot_every_n_steps=2, act_on="evidence"))
    torch.manual_seed(4)
    worker.fit(f"proportion {rank}", Task(nn.Linear(6, 2)), data=far_off(rank, AT, count=STEPS, factor=1e6))
    fit("gradient", "gradient", nan, AT)
    fit("weight", "weight", nan, AT)
    fit("flip", "weight", 0.125, AT)
    fit("moment", "moment", inf, AT)
    fit("buffer", "buffer", nan, AT, module="norm", strategy=DDPStrategy(broadcast_buffers=False))
    fit("norm", module="norm", data=spoilt(rank))
    # The first batch of two, whose gradients are not synchronised.
    fit("accumulated loss", "loss", nan, AT - 1, accumulate_grad_batches=2)
    fit("accumulated gradient", "gradient", nan, AT - 1, accumulate_grad_batches=2)


class Raises(Callback):
    """One rank raises in mid-run."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == AT and trainer.global_rank == trainer.world_size - 1:
            raise RuntimeError("one rank is out of luck")


def behaviour(worker: Worker) -> None:
    """What else may happen among ranks."""
    nan = float("nan")
    wide = Task(nn.Sequential(nn.Linear(6, 500), nn.Tanh(), nn.Linear(500, 2)))
    torch.manual_seed(4)
    worker.fit("shared", wide, OnRank(1, "weight", nan, AT))
    worker.fit("diverged", task("mlp", lambda p: torch.optim.SGD(p, lr=50.0)), max_epochs=6)
    worker.fit("validation", NaNValidation(mlp()), max_epochs=3)
    worker.fit("observed", None, OnRank(1, "loss", nan, AT), guard=NaNGuard(observe=True))
    toggled = "ddp_find_unused_parameters_true"
    worker.fit("manual", task("manual"), OnRank(1, "loss", nan, AT), strategy=toggled)
    for kind in ("loss", "gradient", "weight"):
        guard = NaNGuard(readback="deferred", snapshot_every_n_steps=2)
        worker.fit(f"deferred {kind}", None, OnRank(1, kind, nan, AT), guard=guard)
    guard = NaNGuard(readback="deferred", snapshot_every_n_steps=4)
    own = DDPStrategy(broadcast_buffers=False)
    worker.fit("deferred statistics", task("norm"), data=far_off(1, 130, count=160), guard=guard, strategy=own)
    guard = NaNGuard(readback="deferred", snapshot_every_n_steps=2)
    worker.fit("deferred samples", data=spoilt(1, 15, 19, 23, 27, 31, count=36), guard=guard)
    guard = NaNGuard(readback="deferred", snapshot_every_n_steps=2)
    fused = task("mlp", lambda p: torch.optim.AdamW(p, lr=0.01, fused=True))
    worker.fit("deferred fused", fused, OnRank(1, "loss", nan, AT), guard=guard)
    for rank in range(worker.world):
        save = SaveAt(AT, worker.folder / f"saved {rank}.ckpt")
        worker.fit(f"saved {rank}", None, OnRank(rank, "weight", nan, AT), save)
        dist.barrier()
        weights = torch.load(save.path, weights_only=True)["state_dict"].values()
        worker.results[f"saved {rank}"]["saved"] = all(bool(torch.isfinite(tensor).all()) for tensor in weights)
    worker.fit("to the start", None, OnRank(1, "weight", nan, AT), guard=NaNGuard(snapshot_every_n_steps=1000))
    worker.fit("from the start", guarded=False, data=without(*range(AT + 1)))
    plain = partial(task, "mlp", lambda p: torch.optim.AdamW(p, lr=0.01))
    falling = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)
    worker.fit("rate as it was", plain(), guarded=False)
    worker.fit("rate lost", plain(), NaNRate(AT))
    worker.fit("rate lost for a while", plain(), NaNRate(AT, lasts=2))
    worker.fit("falling rate lost", plain(falling), NaNRate(AT))
    worker.fit("rate lost from the start", plain(falling), NaNRate(0))
    each = ModelCheckpoint(worker.folder / "lost", every_n_epochs=1)
    worker.fit("lost", None, OnRank(0, "weight", nan, AT), each, guarded=False, enable_checkpointing=True)
    worker.fit("refused", ckpt_path=Path(each.best_model_path), max_epochs=2)


class SaveAt(Callback):
    """Saves before a batch, when a weight has just gone bad."""

    def __init__(self, at: int, path: Path) -> None:
        self.at, self.path = at, path

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.at:
            trainer.save_checkpoint(self.path)


class MoreFits(Callback):
    """Goes on with a suite in spawned ranks, which leave nothing in the process that spawned them."""

    def __init__(self, folder: Path, suite: str) -> None:
        self.folder, self.suite = folder, suite

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        os.environ.update(LOCAL_RANK=str(trainer.local_rank), NODE_RANK="0")  # they are there, and need no launch
        quiet()
        worker = Worker(self.folder, trainer.world_size, "ddp")
        SUITES[self.suite](worker)
        worker.write()


def raising(worker: Worker) -> None:
    """One rank raises."""
    worker.fit("raising", None, Raises())


def uneven(worker: Worker) -> None:
    """One rank has fewer batches."""
    worker.fit("uneven", data=lambda rank: batches(count=STEPS - 3 * rank, seed=rank))


_ALL = (again, apart, mistaken, faults, behaviour, plain, saves, sharded, raising, trials, uneven, zero, zero_alone)
SUITES = {one.__name__: one for one in _ALL}


def quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


def prepare() -> None:
    """What every rank sets before its first fit."""
    faulthandler.enable()
    # No rank outlives its test.
    faulthandler.dump_traceback_later(float(os.environ.get("RANK_TIMEOUT", "400")), exit=True)
    quiet()
    gc.freeze()  # DeepSpeed collects garbage whenever it begins, and needs not look at what was imported


def forked(rank: int, world: int, port: int, folder: Path, suite: str) -> None:
    """One rank of a suite, in a process that was forked for it; its output goes to ``rank<r>.txt``."""
    with open(folder / f"rank{rank}.txt", "wb", buffering=0) as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    os.environ.update(
        LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    prepare()
    worker = Worker(folder, world, "ddp")
    SUITES[suite](worker)
    worker.write()


def main(folder: str, world: str, strategy: str, suite: str) -> None:
    """One rank of a suite, in a process that a launcher has started."""
    prepare()
    worker = Worker(Path(folder), int(world), strategy)
    if "TORCHELASTIC_RUN_ID" in os.environ:

        def on_machines(**options: Any) -> Group:
            group = Group(node=f"machine {int(os.environ['RANK']) // 2}", **options)
            worker.results["snapshot_parts"] = group.snapshot_parts
            return group

        trainer_context.Group = on_machines  # type: ignore[assignment, misc]
    if worker.spawned:
        worker.fit("first", task("mlp", partial(torch.optim.AdamW, lr=0.01)), MoreFits(worker.folder, suite))
        return
    SUITES[suite](worker)
    worker.write()


if __name__ == "__main__":
    main(*sys.argv[1:])
