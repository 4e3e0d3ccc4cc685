"""Cost of the ways in which two processes can exchange a report per update: ``python -m benchmarks.channels [OUT]``.

Two ranks train one DDP model over gloo on the CPU, one thread each, in steps of about ten milliseconds. In each
update a rank posts 72 bytes after its backward pass and reads what both ranks posted in the update before, as the guard
does. The contenders take turns of a few steps within one run, and the time of a step is divided by that of a step
without any exchange in the same round; a second contender without exchange gives the noise. Two clocks are read: the
one on the wall, of whose steps in a turn the median counts, and the processor time of the process with all its threads,
which other load on the machine disturbs least.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.distributed import RESULTS, against
from benchmarks.overhead.report import about
from lightning_nanguard.distributed.sockets import connect

WORLD, STEPS, WARM, ROUNDS, REPEATS = 2, 12, 2, 24, 6
BYTES = 72
Read = Callable[[], list[bytes]]
Post = Callable[[bytes], Read]


def no_exchange() -> Post:
    return lambda data: lambda: [data] * WORLD


def sockets() -> Post:
    """Unix sockets between the processes."""

    def gather(value: object) -> list[object]:
        values: list[object] = [None] * WORLD
        dist.all_gather_object(values, value)
        return values

    channel = connect(dist.get_rank(), gather)
    assert channel is not None
    return lambda data: partial(channel.read, channel.post(data))


def all_reduce() -> Post:
    """An asynchronous all-reduce of a table with one row per rank."""
    group, rank = dist.new_group(backend="gloo"), dist.get_rank()

    def post(data: bytes) -> Read:
        rows = torch.zeros(WORLD, BYTES // 8, dtype=torch.int64)
        rows[rank] = torch.frombuffer(bytearray(data), dtype=torch.int64)
        work = dist.all_reduce(rows, group=group, async_op=True)
        assert work is not None

        def read() -> list[bytes]:
            work.wait()
            return [row.tobytes() for row in rows.numpy()]

        return read

    return post


def all_gather() -> Post:
    """An asynchronous all-gather."""
    group = dist.new_group(backend="gloo")

    def post(data: bytes) -> Read:
        rows = [torch.empty(BYTES, dtype=torch.uint8) for _ in range(WORLD)]
        own = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        work = dist.all_gather(rows, own, group=group, async_op=True)
        assert work is not None

        def read() -> list[bytes]:
            work.wait()
            return [row.numpy().tobytes() for row in rows]

        return read

    return post


def point_to_point() -> Post:
    """``batch_isend_irecv`` with every other rank."""
    group, rank = dist.new_group(backend="gloo"), dist.get_rank()
    others = [other for other in range(WORLD) if other != rank]

    def post(data: bytes) -> Read:
        rows = [torch.empty(BYTES, dtype=torch.uint8) for _ in range(WORLD)]
        rows[rank] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        operations = [dist.P2POp(dist.isend, rows[rank], other, group) for other in others]
        operations += [dist.P2POp(dist.irecv, rows[other], other, group) for other in others]
        works = dist.batch_isend_irecv(operations)

        def read() -> list[bytes]:
            for work in works:
                work.wait()
            return [row.numpy().tobytes() for row in rows]

        return read

    return post


def make_store(port: int) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", port, WORLD, is_master=dist.get_rank() == 0)


def store_keys(port: int) -> Post:
    """A ``TCPStore`` on the node: one key per update and rank, deleted two updates later."""
    store, rank = make_store(port), dist.get_rank()
    posted = 0

    def post(data: bytes) -> Read:
        nonlocal posted
        posted += 1
        store.set(f"{posted}/{rank}", data)
        if posted > 2:
            store.delete_key(f"{posted - 2}/{rank}")
        keys = [f"{posted}/{other}" for other in range(WORLD)]
        return lambda: store.multi_get(keys)

    return post


def store_queues(port: int) -> Post:
    """A ``TCPStore`` on the node: one queue for each pair of ranks."""
    store, rank = make_store(port), dist.get_rank()

    def post(data: bytes) -> Read:
        for other in range(WORLD):
            if other != rank:
                store.queue_push(f"{rank}>{other}", data)
        return lambda: [data if other == rank else store.queue_pop(f"{other}>{rank}") for other in range(WORLD)]

    return post


def contenders(port: int) -> dict[str, Post]:
    return {
        "none": no_exchange(),
        "sockets": sockets(),
        "all_reduce": all_reduce(),
        "all_gather": all_gather(),
        "batch_isend_irecv": point_to_point(),
        "tcp_store_keys": store_keys(port + 1),
        "tcp_store_queues": store_queues(port + 2),
        "none_again": no_exchange(),
    }


class Loop:
    """A DDP training loop that exchanges a report in each update."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(256, 384), nn.GELU(), nn.Linear(384, 384), nn.GELU(), nn.Linear(384, 8))
        self.ddp = DistributedDataParallel(module)
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        self.draw = torch.Generator().manual_seed(dist.get_rank())

    def turn(self, post: Post, steps: int) -> list[float]:
        """Seconds of each of some steps; each reads the report of the step before."""
        times = [time.perf_counter()]
        before: Read | None = None
        for number in range(steps):
            x = torch.randn(256, 256, generator=self.draw)
            self.optimizer.zero_grad()
            loss = (self.ddp(x) - x[:, :8].square()).square().mean()
            loss.backward()
            data = number.to_bytes(8, "little") * (BYTES // 8)
            read = post(data)
            if before is not None:
                assert len(before()) == WORLD
            before = read
            self.optimizer.step()
            times.append(time.perf_counter())
        if before is not None:
            assert before() == [data] * WORLD
        return [b - a for a, b in pairwise(times)]


def race(rank: int, folder: str, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    loop, posts = Loop(), contenders(port)
    for post in posts.values():
        loop.turn(post, 30)
    wall: dict[str, list[float]] = {name: [] for name in posts}
    cpu: dict[str, list[float]] = {name: [] for name in posts}
    names, order = list(posts), random.Random(port)
    for _ in range(ROUNDS):
        order.shuffle(names)
        for name in names:
            loop.turn(posts[name], WARM)
            worked = time.process_time()
            wall[name].append(statistics.median(loop.turn(posts[name], STEPS)))
            cpu[name].append((time.process_time() - worked) / STEPS)
    result = {
        "step_ms": round(1e3 * statistics.median(wall["none"]), 3),
        "cpu_ms": round(1e3 * statistics.median(cpu["none"]), 3),
        "wall": {name: against(wall[name], wall["none"], wall["none_again"]) for name in posts},
        "cpu": {name: against(cpu[name], cpu["none"], cpu["none_again"]) for name in posts},
        "noise": against(wall["none_again"], wall["none"]),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def summary(runs: list[list[dict[str, Any]]]) -> dict[str, dict[str, float | list[float]]]:
    """Of each contender: ratios to a step without exchange, and processor time beyond that of the sockets; the median
    over repeats, and each repeat, which is the mean of both ranks."""
    found: dict[str, dict[str, float | list[float]]] = {}
    for name in runs[0][0]["wall"]:
        found[name] = {}
        for clock in ("wall", "cpu"):
            values = [statistics.mean(rank[clock][name]["median"] for rank in run) for run in runs]
            found[name][clock] = round(statistics.median(values), 4)
            found[name][f"{clock}_of_repeats"] = [round(value, 4) for value in sorted(values)]
        extra = [
            statistics.mean(
                rank["cpu_ms"] * (rank["cpu"][name]["median"] - rank["cpu"]["sockets"]["median"]) for rank in run
            )
            for run in runs
        ]
        found[name]["cpu_ms_beyond_sockets"] = round(statistics.median(extra), 3)
        found[name]["cpu_ms_beyond_sockets_of_repeats"] = [round(value, 3) for value in sorted(extra)]
    return found


def main(out: str | None = None) -> None:
    started = time.perf_counter()
    runs = []
    for repeat in range(REPEATS):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(race, args=(folder, 29500 + os.getpid() % 1000 + 10 * repeat), nprocs=WORLD)
            runs.append([json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(WORLD)])
        print(f"repeat {repeat}: steps of {[one['step_ms'] for one in runs[-1]]} ms, load {os.getloadavg()[0]:.1f}")
    found = summary(runs)
    for name, one in found.items():
        print(f"{name:24s} {one}")
    setting = {"processes": WORLD, "rounds": ROUNDS, "steps_a_turn": STEPS, "bytes": BYTES}
    result = {**about("cpu", time.perf_counter() - started), **setting, "summary": found, "runs": runs}
    path = Path(out) if out else RESULTS / "channels.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
