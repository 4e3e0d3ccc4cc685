"""What each rank runs: many fits in a row, since making a process group takes seconds and a fit does not.

Started as a script, by spawn (``python -m tests.distributed.worker OUT WORLD HOW SUITE``) or under torchrun; every rank
writes what it saw to ``OUT/rank<r>.json``.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_nanguard import NaNGuard
from tests.distributed.saving import saves
from tests.helpers import FaultAt, Task, batches, learner_of, task, trainer_for, with_nan

STEPS = 13
AT = 7


class OnRank(FaultAt):
    """A fault on one rank only."""

    def __init__(self, rank: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rank = rank

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if trainer.global_rank != self.rank:
            self.steps = set()


class AfterInterventions(Callback):
    """A fingerprint of parameters and moments after every batch in which the guard acted."""

    def __init__(self, guard: NaNGuard) -> None:
        self.guard = guard
        self.seen = 0
        self.prints: list[str] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if len(self.guard.interventions) > self.seen:
            self.seen = len(self.guard.interventions)
            self.prints.append(fingerprint(trainer, pl_module))


def fingerprint(trainer: Trainer, module: Any) -> str:
    """Of every bit of parameters and optimizer state."""
    digest = hashlib.sha256()
    for tensor in replicated_tensors(trainer, module):
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def replicated_tensors(trainer: Trainer, module: Any) -> Iterator[Tensor]:
    state = learner_of(trainer, module)
    yield from state["parameters"].values()
    for optimizer in state["optimizers"]:
        for entry in optimizer["state"].values():
            yield from (value for value in entry.values() if isinstance(value, Tensor))


def finite(trainer: Trainer, module: Any) -> bool:
    tensors = [*replicated_tensors(trainer, module), *module.buffers()]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point())


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
        **options: Any,
    ) -> tuple[Trainer, Task]:
        """One fit, each rank on data of its own; what is left of it is kept under ``name``."""
        module = module or task("mlp")
        if guard is None and guarded:
            guard = NaNGuard(snapshot_every_n_steps=2)
        watch = [AfterInterventions(guard)] if guard is not None else []
        strategy = options.pop("strategy", DDPStrategy(start_method="spawn") if self.spawned else "ddp")
        trainer = trainer_for(
            self.folder,
            guard,
            [*callbacks, *watch],
            devices=self.world,
            strategy="ddp"
            if dist.is_initialized() and isinstance(strategy, DDPStrategy) and self.spawned
            else strategy,
            use_distributed_sampler=False,
            **options,
        )
        torch.manual_seed(1)
        rank = trainer.global_rank
        made = data(rank) if data is not None else batches(count=STEPS, seed=rank)
        loader = DataLoader(made, batch_size=None)
        val = DataLoader(batches(count=2, seed=50 + rank), batch_size=None)
        error = None
        try:
            trainer.fit(module, loader, val)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        self.results[name] = {
            "records": [record.to_dict() for record in guard.interventions] if guard is not None else [],
            "after": watch[0].prints if watch else [],
            "end": fingerprint(trainer, module),
            "finite": finite(trainer, module),
            "steps": trainer.global_step,
            "batches": len(made),
            "lr_multiplier": guard.lr_multiplier if guard is not None else 1.0,
            "error": error,
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
    worker.fit("without", guarded=False, data=lambda rank: without(batches(count=STEPS, seed=rank)))
    for rank in range(worker.world):
        one_rank(worker, rank)


def without(data: list[Any]) -> list[Any]:
    return [batch for index, batch in enumerate(data) if index != AT]


def one_rank(worker: Worker, rank: int) -> None:
    def spoilt(which: int) -> list[Any]:
        data = batches(count=STEPS, seed=which)
        return [with_nan(b, 1) if i == AT and which == rank else b for i, b in enumerate(data)]

    nan, inf = float("nan"), float("inf")
    worker.fit(f"sample {rank}", data=spoilt)
    worker.fit(f"loss {rank}", None, OnRank(rank, "loss", nan, AT))
    worker.fit(f"infinite {rank}", None, OnRank(rank, "loss", inf, AT))
    worker.fit(f"spike {rank}", None, OnRank(rank, "loss", 1e12, AT))
    worker.fit(f"gradient {rank}", None, OnRank(rank, "gradient", nan, AT))
    worker.fit(f"weight {rank}", None, OnRank(rank, "weight", nan, AT))
    worker.fit(f"flip {rank}", None, OnRank(rank, "weight", 0.125, AT))
    worker.fit(f"moment {rank}", None, OnRank(rank, "moment", inf, AT))
    worker.fit(
        f"buffer {rank}", task("norm"), OnRank(rank, "buffer", nan, AT), strategy=DDPStrategy(broadcast_buffers=False)
    )
    worker.fit(f"accumulated {rank}", None, OnRank(rank, "loss", nan, AT), accumulate_grad_batches=2)
    worker.fit(f"norm {rank}", task("norm"), data=spoilt)


SUITES = {"faults": faults, "saves": saves}


def main(folder: str, world: str, strategy: str, suite: str) -> None:
    faulthandler.dump_traceback_later(220, exit=True)  # no rank outlives its test
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    worker = Worker(Path(folder), int(world), strategy)
    SUITES[suite](worker)
    worker.write()


if __name__ == "__main__":
    main(*sys.argv[1:])
