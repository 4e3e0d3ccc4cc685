"""Starts the processes of a suite once for all tests, whichever worker of pytest they run in."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT = 420
Results = list[dict[str, Any]]
Launch = Callable[[str, int, str], Results]


def command(how: str, world: int, folder: Path, suite: str) -> list[str]:
    """How the ranks are started: ``script`` (Lightning starts the others), ``spawn`` or ``torchrun``."""
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


@pytest.fixture(scope="session")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """What every rank saw of a suite: ``launched("torchrun", 3, "faults")``."""
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
                    status, output = run(command(how, world, folder, suite))
                    (folder / "output.txt").write_text(f"{status}\n{output}", encoding="utf-8")
            said = (folder / "output.txt").read_text(encoding="utf-8")
            assert said.startswith("0\n"), said[-5000:]
            known[how, world, suite] = [
                json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(world)
            ]
        return known[how, world, suite]

    return launch
