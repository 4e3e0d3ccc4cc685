"""``python -m benchmarks.kills``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from .campaign import Campaign

RESULTS = Path(__file__).parents[1] / "results"


def main(argv: list[str] | None = None) -> int:
    """Kill, look, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "kills.json", help="where the figures go")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    started = time.perf_counter()
    elsewhere = _elsewhere()

    def show(done: int) -> None:
        if done % 10 == 0:
            print(f"{done} of {arguments.kills} kills, {time.perf_counter() - started:.0f} s", flush=True)

    figures = Campaign(arguments.seed, elsewhere).run(arguments.kills, show)
    about = {
        "date": date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pytorch-lightning": version("pytorch-lightning"),
        },
        "seed": arguments.seed,
        "temporary files on another file system": elsewhere is not None,
        "seconds": round(time.perf_counter() - started, 1),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"about": about, **figures}, indent=2) + "\n", encoding="utf-8")
    for key, value in figures.items():
        print(f"{key}: {value}")
    return 1 if figures["wrong"] else 0


def _elsewhere() -> Path | None:
    """A folder on another file system than the temporary one, ``None`` where there is none."""
    memory = Path("/dev/shm")
    if memory.is_dir() and os.access(memory, os.W_OK) and memory.stat().st_dev != Path("/tmp").stat().st_dev:
        return memory
    return None


if __name__ == "__main__":
    sys.exit(main())
