"""Runs each suite of fits once for all tests, in processes of its own, whichever worker of pytest asks for it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.worker import forked

ROOT = Path(__file__).parents[2]
TIMEOUT = 420
Results = list[dict[str, Any]]
Launch = Callable[[str, int, str], Results]

# It imports torch and Lightning once (seconds), and then forks each rank (milliseconds).
_FORK_SERVER = multiprocessing.get_context("forkserver")
_FORK_SERVER.set_forkserver_preload(["tests.distributed.worker"])


def command(how: str, world: int, folder: Path, suite: str) -> list[str]:
    """Command line by which the ranks are started; for ``script``, Lightning itself starts the others."""
    strategy = "ddp_spawn" if how == "spawn" else "ddp"
    arguments = ["-m", "tests.distributed.worker", str(folder), str(world), strategy, suite]
    if how == "torchrun":
        arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), *arguments]
    return [sys.executable, *arguments]


def run(arguments: list[str], timeout: float = TIMEOUT) -> tuple[int, str]:
    """Exit status and output of a program; it and all processes it started are gone afterwards."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        # torchrun's ranks have sessions of their own, and go when it is asked to end; a rank left over ends by itself.
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
    return process.returncode, output


def fork(world: int, folder: Path, suite: str) -> tuple[int, str]:
    """The first exit status that is not zero, and the output of ranks that are forked from the fork server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [_FORK_SERVER.Process(target=forked, args=(rank, world, port, folder, suite)) for rank in range(world)]
    deadline = time.monotonic() + TIMEOUT
    folder_of_test = os.getcwd()
    os.chdir(ROOT)  # or the fork server would not find what it is to import, and say nothing
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(folder_of_test)
    try:
        for one in ranks:
            one.start()
        for one in ranks:
            one.join(max(0.0, deadline - time.monotonic()))
    finally:
        for one in ranks:
            one.kill()
            one.join()
    output = "".join(file.read_text(encoding="utf-8") for file in sorted(folder.glob("rank*.txt")))
    return next((one.exitcode or 0 for one in ranks if one.exitcode), 0), output


@pytest.fixture(scope="session")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """What every rank saw of a suite.

    ``launched("torchrun", 3, "faults")``: how the ranks are started (``fork``, which is fast, ``script``, ``spawn`` or
    ``torchrun``), their number, and the name of the suite.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ranks"
    shared.mkdir(exist_ok=True)
    known: dict[tuple[str, int, str], Results] = {}

    def launch(how: str, world: int, suite: str) -> Results:
        if (how, world, suite) not in known:
            folder = shared / f"{how}-{world}-{suite}"
            with open(f"{folder}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not folder.exists():
                    folder.mkdir()
                    start = fork(world, folder, suite) if how == "fork" else run(command(how, world, folder, suite))
                    (folder / "output.txt").write_text(f"{start[0]}\n{start[1]}", encoding="utf-8")
            said = (folder / "output.txt").read_text(encoding="utf-8")
            assert said.startswith("0\n"), said[-5000:]
            known[how, world, suite] = [
                json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(world)
            ]
        return known[how, world, suite]

    return launch
