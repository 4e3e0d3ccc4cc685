"""What each rank runs of the tests that need no Trainer: the group of ranks, and the guard in a loop of plain PyTorch.

``test_group.py``, ``test_sharded.py`` and ``tests/test_metrics.py`` assert on the results.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import Metric

from benchmarks.plain import PlainHost
from lightning_nanguard.act.base import Remedy
from lightning_nanguard.act.clip_gradients import ClipGradients
from lightning_nanguard.distributed.group import Group
from lightning_nanguard.distributed.ranks import Ranks
from lightning_nanguard.guard.context import Settings
from lightning_nanguard.metrics import GradientNorm, NonFiniteCount, NonFiniteRate
from lightning_nanguard.state.snapshot import Snapshot
from tests.distributed.data import NORMS
from tests.distributed.further import collectives_in
from tests.distributed.test_report import report

_IMPORTED_BY = os.getpid()


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 500), nn.Tanh(), nn.Linear(500, 2))


class PlainLoop(PlainHost):
    """A module trained by hand on one rank's data; gradients are averaged by ``synchronise``."""

    def __init__(
        self,
        module: nn.Module,
        ranks: Ranks,
        synchronise: Callable[[], None] = lambda: None,
        remedies: tuple[Remedy, ...] | None = None,
        settings: Settings | None = None,
    ) -> None:
        super().__init__()
        self.net, self.ranks, self.synchronise = module, ranks, synchronise
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
        self.draw = torch.Generator().manual_seed(dist.get_rank())
        self.prints: dict[int, str] = {}
        settings = settings or Settings(snapshot_every=2)
        self.guard = self.make_guard(module, self.optimizer, settings, remedies=remedies, ranks=ranks)
        self.guard.start()
        self.prints[0] = self.print()

    def train(self, batches: int, spoil: Callable[[PlainLoop, Tensor, Tensor], Tensor | None] | None = None) -> None:
        for _ in range(batches):
            x = torch.randn(8, 6, generator=self.draw)
            self.guard.open_batch()
            self.optimizer.zero_grad()
            loss = (self.net(x) - x[:, :2].square()).square().mean()
            if spoil is not None:
                changed = spoil(self, x, loss)
                loss = loss if changed is None else changed
            self.guard.see_loss(loss)
            loss.backward()
            self.synchronise()
            self.spoil_gradient()
            self.guard.before_step(0)
            self.optimizer.step()
            self.step += 1
            self.guard.close_batch()
            self.prints.setdefault(self.step, self.print())

    def spoil_gradient(self) -> None:
        """What a test overrides."""

    def print(self) -> str:
        digest = hashlib.sha256()
        for tensor in self.own():
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def own(self) -> list[Tensor]:
        tensors = [*self.net.parameters()]
        tensors += [v for entry in self.optimizer.state.values() for v in entry.values() if isinstance(v, Tensor)]
        return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]

    def result(self) -> dict[str, Any]:
        return {
            "records": [record.to_dict() for record in self.records],
            "prints": self.prints,
            "end": self.print(),
            "finite": all(bool(torch.isfinite(tensor).all()) for tensor in self.own()),
            "sharded_moments": all(
                isinstance(entry["exp_avg"], DTensor) == isinstance(parameter, DTensor)
                for parameter, entry in self.optimizer.state.items()
            ),
        }


def averaged(module: nn.Module) -> Callable[[], None]:
    """What DDP does behind backward."""

    def average() -> None:
        for parameter in module.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()

    return average


def plain(worker: Any) -> None:
    """All of this file, for one set of processes."""
    dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=worker.world)
    worker.results = {
        "group": group(),
        "waits": waits_for_nobody(worker.folder),
        "collectives": collectives(),
        "memory": memory(),
        "metrics": metrics(),
        "preloaded": os.getpid() != _IMPORTED_BY,
        "sharded": sharded(1),
    }


def metrics() -> dict[str, float]:
    """What this rank computes of the metrics of both."""
    rank = dist.get_rank()
    norms = {how: GradientNorm(how) for how in ("mean", "max", "last")}
    found: dict[str, Metric] = {"rate": NonFiniteRate(), "count": NonFiniteCount(), **norms}
    # A rank whose gradients are all bad, or missing, leaves no trace.
    found["one_rank"] = GradientNorm("last")
    found["one_rank"].update(7.0 if rank == 0 else math.nan)
    for name in ("rate", "count", *norms):
        for value in NORMS[rank]:
            found[name](torch.tensor(value))
    return {name: float(metric.compute()) for name, metric in found.items()}


def group() -> dict[str, Any]:
    """What a group brings from rank to rank, by sockets on one machine and by all-reduce among machines."""
    rank = dist.get_rank()
    found: dict[str, Any] = {}
    for name, node in (("one node", "a"), ("nodes", f"node {rank}")):
        ranks = Group(node=node)
        posted = [ranks.post(report(loss=(math.nan, -0.0)[rank], step=step)) for step in range(40)]
        weights = torch.full((5,), float(rank))
        ranks.average([weights])
        found[name] = {
            "gathered": ranks.gather([rank, None, "é" * rank]),
            "last": [one.pack().hex() for one in posted[-1]()],
            "first": [one.step for one in posted[0]()],
            "mine": report(loss=(math.nan, -0.0)[rank], step=39).pack().hex(),
            "average": weights.tolist(),
        }
        split = ranks.split_snapshot(Snapshot(1, 1, {("parameter", "w"): torch.arange(1000.0)}))
        ranks.leave()
        found[name]["alone"] = ranks.gather(rank)
        try:
            ranks.join_snapshot(split)
        except RuntimeError as error:
            found[name]["refused"] = str(error)
        ranks.close()
    return found


def waits_for_nobody(folder: Path) -> dict[str, Any]:
    """Rank 0 ends an update, decisions and all, before the others have begun to tell of theirs."""
    module = net()
    whole = waits(folder / "rank 0 is through", PlainLoop(module, Group(), averaged(module)))
    shards = waits(folder / "rank 0 is through with its shards", PlainLoop(fully_sharded(), Group(sharded=True)))
    return {**whole, "shards": [shards["steps"], shards["records"]]}


def waits(mark: Path, loop: PlainLoop) -> dict[str, Any]:
    """One update in which the others begin to tell when rank 0 is through."""
    loop.train(3)

    def wait() -> None:
        while dist.get_rank() != 0 and not mark.exists():
            time.sleep(0.01)

    loop.spoil_gradient = wait  # type: ignore[method-assign]
    loop.train(1)
    mark.touch()
    loop.spoil_gradient = lambda: None  # type: ignore[method-assign]
    loop.train(2)
    loop.guard.flush()
    return {"steps": loop.step, "end": loop.print(), "records": len(loop.records)}


class CountCollectives(TorchDispatchMode):
    """Counts the collectives that start within it, also those that the guard keeps out of profiles."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def collectives() -> dict[str, int]:
    """How many collectives healthy updates start, with snapshots and their certification among them."""
    updates = 9
    found = {"updates": updates}
    for name, node in (("one node", "a"), ("nodes", f"node {dist.get_rank()}")):
        for how, count in (("started", started), ("profiled", profiled)):
            module = net()
            loop = PlainLoop(module, Group(node=node), averaged(module))
            loop.train(3)
            found[f"{name}, {how}"] = count(partial(loop.train, updates))
            loop.guard.flush()
            loop.guard.close()
    found["of the loop"] = updates * len([*net().parameters()])
    module = fully_sharded()
    loop = PlainLoop(module, Group(sharded=True))
    loop.train(3)
    found["shards"] = profiled(partial(loop.train, updates))
    loop.guard.flush()
    loop.guard.close()

    def bare() -> None:
        for _ in range(updates):
            loop.optimizer.zero_grad()
            module(torch.randn(8, 6)).square().mean().backward()
            loop.optimizer.step()

    found["of the sharded loop"] = profiled(bare)
    return found


def started(run: Callable[[], None]) -> int:
    """Number of collectives that a dispatch mode sees."""
    with CountCollectives() as mode:
        run()
    return mode.count


def profiled(run: Callable[[], None]) -> int:
    """Number of collectives in a profile."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        run()
    return collectives_in(trace)


def fully_sharded() -> nn.Module:
    """The net, its parameters sharded among all ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = net()
    fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return module


def memory() -> dict[str, Any]:
    """Bytes in a snapshot that all ranks of a node keep together, and when each rank is a node of its own."""
    found = {}
    for name, node in (("one node", "a"), ("nodes", f"node {dist.get_rank()}")):
        module = net()
        loop = PlainLoop(module, Group(node=node), averaged(module))
        loop.train(40)
        whole = sum(tensor.nbytes for tensor in loop.own())
        kept = loop.guard.context.ring.certified
        restored = [loop.ranks.join_snapshot(snapshot) for snapshot in kept]
        found[name] = {
            "whole": whole,
            "kept": [snapshot.nbytes() for snapshot in kept],
            "restored": [_print(one) == loop.prints[one.global_step] for one in restored],
        }
        loop.guard.close()
    return found


def _print(snapshot: Snapshot) -> str:
    leaves = snapshot.leaves
    digest = hashlib.sha256()
    for kind in ("parameter", "optimizer"):
        for path, leaf in leaves.items():
            if path[0] == kind and isinstance(leaf, Tensor):
                digest.update(leaf.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sharded(rank: int) -> dict[str, Any]:
    """``fully_shard``: faults on one rank's loss, on its shard of a gradient, of a weight and of a moment."""

    def made(**options: Any) -> PlainLoop:
        return PlainLoop(fully_sharded(), Group(sharded=True), **options)

    found: dict[str, Any] = {}
    me = dist.get_rank() == rank

    def run(name: str, **options: Any) -> PlainLoop:
        loop = made(**options)
        loop.train(8)
        return loop

    def end(name: str, loop: PlainLoop, batches: int = 4) -> None:
        loop.train(batches)
        loop.guard.flush()
        found[name] = loop.result()
        loop.guard.close()

    loop = run("loss")
    loop.train(1, lambda loop, x, loss: loss * float("nan") if me else None)
    end("loss", loop)

    loop = run("gradient")

    def spoil() -> None:
        if me and loop.step == 8:
            next(loop.net.parameters()).grad.to_local()[0, 0] = float("nan")  # type: ignore[union-attr]

    loop.spoil_gradient = spoil  # type: ignore[method-assign]
    end("gradient", loop)

    loop = run("weight")
    if me:
        with torch.no_grad():
            next(loop.net.parameters()).to_local()[0, 0] = float("nan")
    end("weight", loop)

    loop = run("moment")
    if me:
        loop.optimizer.state[next(loop.net.parameters())]["exp_avg_sq"].to_local()[0, 0] = float("inf")
    end("moment", loop, 8)

    # Back to the start, where there were no moments, and on: they must be sharded anew.
    loop = made(settings=Settings(snapshot_every=1000))
    loop.train(4)
    with torch.no_grad():
        next(loop.net.parameters()).to_local().fill_(float("nan"))
    end("start", loop)

    loop = run("clipped", remedies=(ClipGradients(clip_val=1e-3),))
    loop.guard._parts.recovery.clip(1e-3, "norm")
    loop.train(1)
    norms = [float(p.grad.to_local().square().sum()) for p in loop.net.parameters() if p.grad is not None]  # type: ignore[union-attr]
    found["clipped"] = sum(norms)
    loop.guard.close()
    return found
