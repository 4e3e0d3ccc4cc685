"""What the recorder costs: time of an update, and size and time of what a million updates leave.

    python -m benchmarks.recorder [--updates 1000000]

The clock is the thread's own time, so that waiting for other processes does not count.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_nanguard import Intervention, Reading
from lightning_nanguard.measure.norm_history import NormHistory
from lightning_nanguard.record.curve import CURVE_FILE, CurveFile
from lightning_nanguard.record.files import RECORDS_FILE
from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.report.data import read_run_data
from lightning_nanguard.report.page import page

STEP = 10_000.0
"""Microseconds of the step that the cost is compared with."""


@dataclass(frozen=True)
class Recorded:
    """What was measured.

    Attributes:
        curve: Microseconds an update for its row in the file of curves, writing and joining of rows included.
        norms: Microseconds an update for keeping the norms of its layers.
        file_bytes: Size of the file of curves.
        page_bytes: Size of the page.
        page_seconds: Time to read the files and to make the page.
    """

    curve: float
    norms: float
    file_bytes: int
    page_bytes: int
    page_seconds: float


def measure(updates: int, interventions: int, folder: Path) -> Recorded:
    """Record a run of many updates, and make its page.

    Args:
        updates: Number of updates.
        interventions: Number of interventions, spread over the run.
        folder: An empty folder.
    """
    # A step of 10 ms, on a clock of its own: the file is written to as often as it would be.
    now = [0.0]
    curve = CurveFile(folder / CURVE_FILE, clock=lambda: now[0])

    def record() -> None:
        for step in range(1, updates + 1):
            now[0] += STEP / 1e6
            curve.add(Reading(step, 0, 1.0 + math.sin(step / 7.0) / step, 2.0), 0.1, None)
        curve.write(last=True)

    history, norms = NormHistory(), [torch.ones(()) for _ in range(100)]

    def keep() -> None:
        for step in range(1, updates + 1):
            history.keep(step, 0, norms)

    curve_time, norms_time = _seconds(record), _seconds(keep)
    sink = JsonLines(folder / RECORDS_FILE)
    for number in range(interventions):
        step = number * updates // interventions
        sink.write(Intervention(step, 0, step, "non_finite_loss", "loss", ("skip",), 0.1, 0.1))
    sink.close()
    begun = time.perf_counter()
    text = page(read_run_data(folder))
    page_seconds = time.perf_counter() - begun
    size = (folder / CURVE_FILE).stat().st_size
    return Recorded(1e6 * curve_time / updates, 1e6 * norms_time / updates, size, len(text.encode()), page_seconds)


def _seconds(run: Callable[[], None]) -> float:
    begun = time.thread_time()
    run()
    return time.thread_time() - begun


def main() -> None:
    """Measure, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=1_000_000, help="updates of the run")
    parser.add_argument("--interventions", type=int, default=5_000, help="interventions of the run")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(chosen.updates, chosen.interventions, Path(folder))
    both = found.curve + found.norms
    print(f"{chosen.updates:,} updates, {chosen.interventions:,} interventions")
    print(f"curves: {found.curve:.2f} µs an update; norms of the layers: {found.norms:.2f} µs an update")
    print(f"together {both / STEP:.3%} of a step of 10 ms")
    print(f"{CURVE_FILE}: {found.file_bytes / 1e6:.2f} MB")
    print(f"page: {found.page_bytes / 1e6:.2f} MB, made in {found.page_seconds:.2f} s")


if __name__ == "__main__":
    main()
