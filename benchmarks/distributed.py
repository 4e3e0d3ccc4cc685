"""What a healthy step costs among two processes: ``python -m benchmarks.distributed [OUT [ROUNDS [RUNS]]]``.

Two ranks run one DDP loop over gloo. Its steps go on in turns with the guard, with the guard as it is among machines
(the ranks are told that they are of two), without it, and without it once more; the spread of the two equal ones is
what a difference must be held against. Each rank's step takes about ten milliseconds.
Two clocks are read: the one on the wall, of whose steps in a turn the median counts, and the processor time of the
whole process with all its threads, snapshots included, which knows no other process. A trace of guarded steps and of
bare ones then lists every collective, but for the guard's own among machines, which it keeps out of profiles.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from benchmarks.overhead.report import about
from benchmarks.plain import PlainHost
from lightning_nanguard.distributed import group as distributed
from lightning_nanguard.guard.context import Settings
from lightning_nanguard.guard.guard import Guard

WORLD, STEPS, WARM, TRACED = 2, 12, 2, 20
RESULTS = Path(__file__).parent / "results"


class Loop(PlainHost):
    """A DDP loop, with a guard where there are settings for one."""

    def __init__(self, settings: Settings | None = None, node: str = "one") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(256, 384), nn.GELU(), nn.Linear(384, 384), nn.GELU(), nn.Linear(384, 8))
        self.ddp = DistributedDataParallel(self.module)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-3)
        self.draw = torch.Generator().manual_seed(dist.get_rank())
        self.guard: Guard | None = None
        if settings is not None:
            self.guard = self.make_guard(self.module, self.optimizer, settings, ranks=distributed.Group(node=node))
            self.guard.start()

    def one(self) -> None:
        x = torch.randn(256, 256, generator=self.draw)
        if self.guard is not None:
            self.guard.open_batch()
        self.optimizer.zero_grad()
        loss = (self.ddp(x) - x[:, :8].square()).square().mean()
        if self.guard is not None:
            self.guard.see_loss(loss)
        loss.backward()
        if self.guard is not None:
            self.guard.before_step(0)
        self.optimizer.step()
        self.step += 1
        if self.guard is not None:
            self.guard.close_batch()


def settled() -> int:
    """The interval that a guard chooses whose loop is alone: in turns with others its steps would look longer."""
    loop = Loop(Settings())
    for _ in range(100):
        loop.one()
    assert loop.guard is not None
    every = loop.guard._parts.snapshots._interval.updates
    loop.guard.close()
    return every


def race(rank: int, folder: str, port: int, rounds: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    every = settled()
    settings = Settings(snapshot_every=every)
    loops = {
        "bare": Loop(),
        "guarded": Loop(settings),
        "machines": Loop(settings, node=str(rank)),
        "bare again": Loop(),
    }
    for loop in loops.values():
        for _ in range(40):
            loop.one()
    wall: dict[str, list[float]] = {name: [] for name in loops}
    cpu: dict[str, list[float]] = {name: [] for name in loops}
    names, order = list(loops), random.Random(0)
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            for _ in range(WARM):
                loops[name].one()
            times, worked = [time.perf_counter()], time.process_time()
            for _ in range(STEPS):
                loops[name].one()
                times.append(time.perf_counter())
            cpu[name].append((time.process_time() - worked) / STEPS)
            wall[name].append(statistics.median(b - a for a, b in pairwise(times)))
    assert not any(loop.records for loop in loops.values())
    result = {
        "bare_ms": round(1e3 * statistics.median(wall["bare"]), 3),
        "bare_cpu_ms": round(1e3 * statistics.median(cpu["bare"]), 3),
        **compared("wall", wall),
        **compared("cpu", cpu),
        "snapshot_every": every,
        f"collectives_of_{TRACED}_steps": {name: collectives(loop) for name, loop in loops.items()},
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def collectives(loop: Loop) -> dict[str, int]:
    """How often each is called in a trace."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        for _ in range(TRACED):
            loop.one()
    return {event.key: event.count for event in trace.key_averages() if event.key.startswith(("c10d::", "gloo:"))}


def compared(clock: str, times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Each loop against the mean of the two bare ones, and those against each other."""
    bare, again = times["bare"], times["bare again"]
    return {
        f"guarded_{clock}": against(times["guarded"], bare, again),
        f"machines_{clock}": against(times["machines"], bare, again),
        f"equal_{clock}": against(again, bare),
    }


def against(mine: list[float], *others: list[float]) -> dict[str, float]:
    """Quartiles of the ratio in each round, and the ratio of the whole race's sums, whose noise has averaged out."""
    bare = [statistics.mean(turns) for turns in zip(*others, strict=True)]
    ratios = [one / other for one, other in zip(mine, bare, strict=True)]
    return {**quartiles(ratios), "of_sums": round(sum(mine) / sum(bare), 4)}


def quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"low": round(low, 4), "median": round(middle, 4), "high": round(high, 4)}


def main(out: str | None = None, rounds: str = "60", repeats: str = "3") -> None:
    started = time.perf_counter()
    runs = []
    for run in range(int(repeats)):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(race, args=(folder, 29500 + os.getpid() % 1000 + run, int(rounds)), nprocs=WORLD)
            runs.append([json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(WORLD)])
        for rank, one in enumerate(runs[-1]):
            print(f"run {run}, rank {rank}: a bare step of {one['bare_ms']} ms")
            for name in (name for name in one if name.endswith(("_wall", "_cpu"))):
                print(f"  {name:14s} {one[name]}")
    about_it = {**about("cpu", time.perf_counter() - started), "threads": 1}
    result = {**about_it, "processes": WORLD, "rounds": int(rounds), "steps_a_turn": STEPS, "runs": runs}
    path = Path(out) if out else RESULTS / "distributed.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
