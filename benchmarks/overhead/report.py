"""Tables, plot and JSON of what was measured."""

from __future__ import annotations

import math
import os
import platform
from datetime import date
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .contenders import CONTENDERS
from .turns import Times

Results = dict[str, Any]


def about(device: str, seconds: float) -> dict[str, Any]:
    """Where, when and with what the figures were made."""
    import pytorch_lightning
    import torch

    return {
        "date": date.today().isoformat(),
        "hardware": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "pytorch-lightning": pytorch_lightning.__version__},
        "seconds": round(seconds, 1),
    }  # fmt: skip


def comparable(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether figures were made on the same hardware with the same versions."""
    return all(one[key] == other[key] for key in ("hardware", "machine", "threads", "versions"))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def compare(times: Times) -> dict[str, float]:
    """The time of a step with something over that without it, of the same round.

    ``ratio`` is the median over the rounds with its quartiles ``low`` and ``high``, and ``error`` its standard error;
    ``extra_us`` the median of the difference a step, with ``extra_error``; ``cpu_ratio`` the sum of the thread's own
    time over that without it, which knows no waiting for other processes. What comes in few steps, as snapshots do,
    is in the sums as often as it fell into a measured step, and hardly in the medians: the parts have it.
    """
    ratios = [on[0] / off[0] for off, on in times]
    extra = [1e6 * (on[0] - off[0]) for off, on in times]
    low, _, high = _quartiles(ratios)
    least, _, most = _quartiles(extra)
    return {
        "bare_us": 1e6 * median(off[0] for off, _ in times),
        "ratio": median(ratios),
        "low": low,
        "high": high,
        "error": _error(low, high, len(times)),
        "extra_us": median(extra),
        "extra_error": _error(least, most, len(times)),
        "cpu_ratio": sum(on[1] for _, on in times) / sum(off[1] for off, _ in times),
        "rounds": len(times),
    }


def _quartiles(values: list[float]) -> list[float]:
    return quantiles(values, n=4) if len(values) > 1 else values * 3


def _error(low: float, high: float, count: int) -> float:
    # Of a median, as if values were distributed normally: sqrt(pi / 2) sigma / sqrt(count), and sigma is the distance
    # of the quartiles over 1.349.
    return 0.929 * (high - low) / math.sqrt(count)


def show_race(console: Console, title: str, compared: dict[str, dict[str, float]]) -> None:
    """One workload's table."""
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for heading in ("", "µs a step without", "extra µs", "times", "quartiles", "of its thread's time", "rounds"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, one in compared.items():
        contender = CONTENDERS[name]
        note = "" if contender.beside == "bare Lightning" else f" (beside {contender.beside} alone)"
        table.add_row(
            contender.title + note, f"{one['bare_us']:,.0f}", f"{one['extra_us']:+,.0f} ± {one['extra_error']:,.0f}",
            f"{one['ratio']:.3f} ± {one['error']:.3f}", f"{one['low']:.3f} to {one['high']:.3f}",
            f"{one['cpu_ratio']:.3f}", f"{one['rounds']:.0f}",
        )  # fmt: skip
    console.print(table)


def show_parts(console: Console, title: str, found: dict[str, Any]) -> None:
    """Where the guard's time goes on one workload."""
    table = Table(title=f"{title}: the guard by part", box=SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    table.add_column("µs a step", justify="right")
    for name, value in found["parts"].items():
        table.add_row(name.replace("  ", "    "), f"{value:,.1f}")
    table.add_row("all hooks together", f"{found['guard']:,.1f}")
    table.add_row("one read of the gradients (the bound)", f"{found['bound']:,.1f}")
    table.add_row("distance to the bound", f"{found['guard'] - found['bound']:,.1f}")
    table.add_row("a step", f"{found['step']:,.0f}")
    console.print(table)


def show_states(console: Console, found: dict[str, dict[str, Any]]) -> None:
    """Snapshots and rollbacks beside checkpoint files."""
    table = Table(title="Snapshot, rollback, checkpoint file of the same state", box=SIMPLE_HEAD, title_justify="left")
    headings = ("", "MB", "capture ms", "rollback ms", "save ms", "load ms", "rollback over load", "found after")
    for heading in headings:
        table.add_column(heading, justify="left" if not heading else "right")
    for title, one in found.items():
        table.add_row(
            title, f"{one['snapshot_bytes'] / 1e6:.2f}", f"{one['capture_ms']:.2f}", f"{one['rollback_ms']:.2f}",
            f"{one['checkpoint_save_ms']:.1f}", f"{one['checkpoint_load_ms']:.1f}",
            f"{one['rollback_times_faster']:.0f} times", f"{one.get('delay_steps', '–')} steps",
        )  # fmt: skip
    console.print(table)


def show_growth(console: Console, found: list[dict[str, float]]) -> None:
    """How the cost grows with bytes and with tensors."""
    table = Table(title="Growth: µs a step in the guard's hooks", box=SIMPLE_HEAD, title_justify="left")
    for heading in ("tensors", "elements each", "MB", "guard µs", "bound µs", "µs a tensor", "share of the step"):
        table.add_column(heading, justify="right")
    for one in found:
        table.add_row(
            f"{one['tensors']:,.0f}", f"{one['size']:,.0f}", f"{one['bytes'] / 1e6:.2f}", f"{one['guard']:,.0f}",
            f"{one['bound']:,.0f}", f"{one['guard'] / one['tensors']:.2f}", f"{100 * one['guard'] / one['step']:.1f} %",
        )  # fmt: skip
    console.print(table)


def plot(results: Results, path: Path) -> None:
    """Extra time of each contender over bare, a panel a workload; needs matplotlib (the ``report`` extra)."""
    from matplotlib.figure import Figure

    races = results["races"]
    figure = Figure(figsize=(4.2 * len(races), 4.2), layout="constrained")
    for index, (title, compared) in enumerate(races.items()):
        axes = figure.add_subplot(1, len(races), index + 1)
        names = list(compared)[::-1]
        extra = [100 * (compared[name]["ratio"] - 1) for name in names]
        spread = [
            [100 * (compared[name]["ratio"] - compared[name]["low"]) for name in names],
            [100 * (compared[name]["high"] - compared[name]["ratio"]) for name in names],
        ]
        colours = ["tab:green" if "guard" in name or name == "deferred" else "tab:grey" for name in names]
        axes.barh(range(len(names)), extra, xerr=spread, color=colours, ecolor="black", capsize=2)
        axes.set_yticks(range(len(names)), [CONTENDERS[name].title for name in names], fontsize=7)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xscale("symlog", linthresh=10)
        axes.set_xlabel("% over bare (symlog)")
        axes.set_title(title, fontsize=9)
    figure.savefig(path, dpi=110)
