"""What only a real card can show, in at most twelve minutes: ``python -m benchmarks.gpu_check``.

The parts run in the order of what would do most harm if it were wrong. Each writes a JSON file of its own into
``benchmarks/results/gpu-<card>``; a part whose file is there is not run again, so that a run that was cut short goes on
where it stopped. ``--device cpu`` runs the same parts on the CPU with tensors of next to no size, with a fake device
where a part needs streams: that tests the script, and says nothing of a card.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_parts
from benchmarks.gpu_parts import PARTS, Bench

RESULTS = Path(__file__).parent / "results"
BUDGET = 720.0
"""Seconds after which no further part begins."""


def name_of(device: str) -> str:
    """The card's name, for the folder of its results."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu-{platform.machine()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run_part(name: str, bench: Bench, folder: Path) -> dict[str, Any]:
    """Run a part and keep what it found, an error included; what is there already is read."""
    path = folder / f"{name}.json"
    if path.exists():
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return known
    started = time.perf_counter()
    try:
        found = PARTS[name](bench)
    except Exception as error:
        found = {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
    about = {
        "part": name,
        "device": name_of(bench.device),
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - started, 2),
    }
    found = {**about, **found}
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(found, indent=1), encoding="utf-8")
    unfinished.rename(path)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; gives 0 where all that ran are as they should be."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=None, help="folder of the results")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), help="parts to run")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds after which no further part begins")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu tests the script itself")
    folder = given.output or RESULTS / f"gpu-{name_of(given.device)}"
    bench, started, bad = Bench(given.device), time.perf_counter(), 0
    for name in given.only or PARTS:
        if time.perf_counter() - started > given.budget:
            print(f"{name}: no time left; run the same command again")
            continue
        found = run_part(name, bench, folder)
        bad += not found["ok"]
        shown = {key: value for key, value in found.items() if key not in ("part", "device", "torch")}
        print(f"{name}: {json.dumps(shown)[: gpu_parts.SHOWN]}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
