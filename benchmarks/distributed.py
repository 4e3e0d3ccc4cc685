"""What a healthy step costs among two processes: ``python -m benchmarks.distributed [OUT [ROUNDS [RUNS]]]``.

Two ranks run one DDP loop over gloo. Its steps go on in turns with the guard, without it, and without it once more; the
spread of the two equal ones is what a difference must be held against. Each rank's step takes about ten milliseconds.
A trace of guarded steps then lists every collective, and how long the guard waited for its own.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from benchmarks.plain import PlainHost
from lightning_nanguard import distributed
from lightning_nanguard.engine import Guard, Settings

WORLD, STEPS, WARM = 2, 20, 3
RESULTS = Path(__file__).parent / "results"


class Loop(PlainHost):
    """A DDP loop, guarded or not."""

    def __init__(self, guarded: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(256, 384), nn.GELU(), nn.Linear(384, 384), nn.GELU(), nn.Linear(384, 8))
        self.ddp = DistributedDataParallel(self.module)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-3)
        self.draw = torch.Generator().manual_seed(dist.get_rank())
        self.guard: Guard | None = None
        if guarded:
            self.guard = self.make_guard(self.module, self.optimizer, Settings(), ranks=distributed.Group())
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


class Waits:
    """Adds up how long the guard waits for what all ranks say."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        original = distributed._Underway.reports

        def reports(underway: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(underway)
            finally:
                self.seconds.append(time.perf_counter() - started)

        distributed._Underway.reports = reports  # type: ignore[method-assign]


def race(rank: int, folder: str, port: int, rounds: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    loops = {"bare": Loop(False), "guarded": Loop(True), "bare again": Loop(False)}
    for loop in loops.values():
        for _ in range(40):
            loop.one()
    waits = Waits()
    medians: dict[str, list[float]] = {name: [] for name in loops}
    names = list(loops)
    for number in range(rounds):
        for name in names[number % 3 :] + names[: number % 3]:
            times = []
            for step in range(WARM + STEPS):
                started = time.perf_counter()
                loops[name].one()
                if step >= WARM:
                    times.append(time.perf_counter() - started)
            medians[name].append(statistics.median(times))
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        for _ in range(20):
            loops["guarded"].one()
    collectives = {
        event.key: {"calls": event.count, "ms": round(event.cpu_time_total / 1e3, 3)}
        for event in trace.key_averages()
        if "c10d::" in event.key or "gloo:" in event.key
    }
    ratios = [guarded / bare for guarded, bare in zip(medians["guarded"], medians["bare"], strict=True)]
    equal = [again / bare for again, bare in zip(medians["bare again"], medians["bare"], strict=True)]
    guarded = loops["guarded"]
    assert not guarded.records
    dist.barrier()
    result = {
        "bare_ms": round(1e3 * statistics.median(medians["bare"]), 3),
        "guarded": quartiles(ratios),
        "equal": quartiles(equal),
        "waited_us": quartiles([1e6 * seconds for seconds in waits.seconds]),
        "collectives_of_20_steps": collectives,
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"low": round(low, 4), "median": round(middle, 4), "high": round(high, 4)}


def main(out: str | None = None, rounds: str = "30", repeats: str = "3") -> None:
    runs = []
    for run in range(int(repeats)):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(race, args=(folder, 29500 + os.getpid() % 1000 + run, int(rounds)), nprocs=WORLD)
            runs.append([json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(WORLD)])
        for rank, one in enumerate(runs[-1]):
            print(f"run {run} rank {rank}: bare {one['bare_ms']} ms, guarded {one['guarded']}, equal {one['equal']}")
    result = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.processor() or platform.machine()}",
        "torch": torch.__version__,
        "processes": WORLD,
        "rounds": int(rounds),
        "steps_a_round": STEPS,
        "runs": runs,
    }
    path = Path(out) if out else RESULTS / "distributed.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
