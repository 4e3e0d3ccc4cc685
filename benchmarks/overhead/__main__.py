"""``python -m benchmarks.overhead``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import report
from .contenders import CONTENDERS
from .models import CPU, CUDA, Classifier, Pieces, Workload, _vectors
from .parts import profile
from .states import measure_states, peak_memory
from .turns import Times, take_turns

# Each contender has a run of its own; in several passes each meets other hours of the machine, and other memory.
_PASSES = 3


def main(argv: list[str] | None = None) -> int:
    """Measure, show, write."""
    arguments = _parser().parse_args(argv)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        torch.set_num_threads(1)
    _silence()
    console = Console(width=None if sys.stdout.isatty() else 130)
    chosen = CUDA if device == "cuda" else CPU
    names = arguments.workloads.split(",") if arguments.workloads else list(chosen)
    unknown = set(names) - set(chosen)
    if unknown:
        sys.exit(f"no workload is named {', '.join(sorted(unknown))}; on {device} there are {', '.join(chosen)}")
    workloads = [_shorter(chosen[name], arguments.fast) for name in names]
    output: Path = arguments.output or Path(f"benchmarks/results/overhead-{device}.json")
    # Some workloads alone take their places among the others.
    here = report.about(device, 0.0)
    results = json.loads(output.read_text()) if arguments.workloads and output.exists() else {"about": here}
    if not report.comparable(results["about"], here):
        sys.exit(f"{output} was made on other hardware or with other versions; write elsewhere with --output")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        for _ in _measured(results, workloads, device, Path(place), console):
            # Whatever comes later may fail.
            _write(results, output, device, time.perf_counter() - started)
        if not arguments.workloads:
            results["growth"] = list(_growth(Path(place), device, arguments.fast))
            report.show_growth(console, results["growth"])
            _write(results, output, device, time.perf_counter() - started)
    console.print(json.dumps(results["about"]), highlight=False)
    console.print(f"{output} written")
    if find_spec("matplotlib") is None:
        console.print("no plot: it needs matplotlib, pip install 'lightning-nanguard[report]'")
    else:
        report.plot(results, output.with_suffix(".png"))
    return 0


def _measured(
    results: report.Results, workloads: list[Workload], device: str, folder: Path, console: Console
) -> Iterator[None]:
    races, parts, memory, states = (results.setdefault(key, {}) for key in ("races", "parts", "memory", "states"))
    for workload in workloads:
        races[workload.title] = compared = _race(workload, folder, device)
        report.show_race(console, workload.title, compared)
        yield
    for workload in workloads:
        steps = max(30, min(1000, workload.steps * workload.rounds // 2))
        parts[workload.title] = found = profile(workload, folder, device, steps)
        report.show_parts(console, workload.title, found)
        memory[workload.title] = peak_memory(workload, folder, device, 20)
        for mode in ("step",) if workload.few and device == "cpu" else ("step", "deferred"):
            states[f"{workload.title}, {mode}"] = measure_states(workload, folder, device, readback=mode)
        yield
    report.show_states(console, states)


def _write(results: report.Results, output: Path, device: str, seconds: float) -> None:
    results["about"] = report.about(device, seconds)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(_rounded(results), indent=1) + "\n")


def _race(workload: Workload, folder: Path, device: str) -> dict[str, dict[str, float]]:
    wanted = {
        name: contender
        for name, contender in CONTENDERS.items()
        if (contender.matters or not workload.few) and contender.device in (None, device)
    }
    times: dict[str, Times] = {name: [] for name in wanted}
    # A device is nobody else's, and its large models take long to begin.
    passes = 1 if device == "cuda" else _PASSES
    for _ in range(passes):
        for name, contender in wanted.items():
            times[name] += take_turns(contender, workload, folder, device, passes=passes)
    return {name: report.compare(one) for name, one in times.items()}


def _growth(folder: Path, device: str, fast: bool) -> Iterator[dict[str, float]]:
    shapes = [(100, 1_600), (1_000, 160), (10_000, 16), (100, 16_000), (100, 160_000)]
    for count, size in shapes[:3] if fast else shapes:
        workload = Workload(
            f"{count} of {size}",
            # Its weight is summed up: the more elements, the lower the rate it bears.
            lambda count=count, size=size: Classifier(Pieces(count, size), fused=True, rate=1 / (count * size)),  # type: ignore[misc]
            lambda: _vectors(8, 16),
            steps=1,
            rounds=1,
        )
        found = profile(workload, folder, device, 20 if count > 1_000 else 60)
        yield {
            "tensors": count, "size": size, "bytes": 4 * count * size,
            **{key: found[key] for key in ("guard", "bound", "step")},
        }  # fmt: skip


def _shorter(workload: Workload, fast: bool) -> Workload:
    return replace(workload, rounds=max(3, workload.rounds // 10)) if fast else workload


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _silence() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.overhead", description="What the guard costs.")
    parser.add_argument("--fast", action="store_true", help="a tenth of the rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--workloads", default="", metavar="A,B", help=f"of {', '.join(CPU)}; {', '.join(CUDA)}")
    parser.add_argument("--output", type=Path, metavar="JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
