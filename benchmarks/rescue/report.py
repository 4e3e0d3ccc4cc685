"""Tables, plot and JSON of what was measured."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .ablation import EVERYONE
from .contenders import SETTINGS
from .measuring import REGAINED_DATA, Result, Verdict

Summary = dict[str, dict[str, Any]]


def about(seeds: str, first: int, seconds: float) -> dict[str, Any]:
    """Where, when and with what the figures were made."""
    import pytorch_lightning
    import torch

    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "pytorch-lightning": pytorch_lightning.__version__},
        "seeds": seeds,
        "first_seed": first,
        "seconds": round(seconds, 1),
    }  # fmt: skip


def failing(results: Iterable[Result]) -> list[Result]:
    """Those that fail without help while their twin learns."""
    return [r for r in results if r.fails]


def healthy(results: Iterable[Result]) -> list[Result]:
    """Those without a fault."""
    return [r for r in results if r.group == "healthy"]


def groups(results: Iterable[Result]) -> list[str]:
    """Headings, in the order of the catalogue."""
    return list(dict.fromkeys(r.group for r in failing(results)))


def kept_data(verdict: Verdict) -> bool:
    """Whether a run with bad samples is as good as its twin."""
    ends = verdict.error is None and not verdict.poisoned
    return ends and (verdict.regained >= REGAINED_DATA or bool(verdict.within_spread))


def _of(results: Iterable[Result], name: str) -> list[Verdict]:
    return [r.verdicts[name] for r in results if name in r.verdicts]


def _median(values: Sequence[float]) -> float | None:
    return round(median(values), 3) if values else None


def summarise(results: Sequence[Result]) -> Summary:
    """All figures of each contender."""
    summary: Summary = {}
    for name in (n for n in EVERYONE if any(n in r.verdicts for r in results)):
        bad, good = _of(failing(results), name), _of(healthy(results), name)
        saved = [v for v in bad if v.rescued]
        learned = [v for v in saved if v.error is None]
        lost = [v.steps_lost for v in saved if v.steps_lost is not None]
        data = _of((r for r in failing(results) if r.harms_data), name)
        survivors = [v for r in results for _, v in r.survivors if v is not None] if name == "evidence" else []
        summary[name] = {
            "title": EVERYONE[name].title,
            "failing": len(bad),
            "rescued": len(saved),
            "share": round(len(saved) / len(bad), 4) if bad else None,
            "groups": {g: [sum(v.rescued for v in vs), len(vs)] for g in groups(results)
                       for vs in [_of((r for r in failing(results) if r.group == g), name)]},
            "regained_median": _median([max(-9.0, v.regained) for v in bad]),
            "regained_median_of_rescued": _median([v.regained for v in learned]),
            "data_faults": len(data),
            "data_kept": sum(map(kept_data, data)) if name in SETTINGS else None,
            "interventions_mean": round(mean(v.interventions for v in bad), 2) if bad else None,
            "steps_lost_mean": round(mean(lost), 1) if lost else None,
            "time_median_of_rescued": _median([v.time for v in learned]),
            "time_max_of_rescued": round(max((v.time for v in learned), default=math.nan), 3) if learned else None,
            "cpu_time_median_of_rescued": _median([v.cpu_time for v in learned]),
            "cpu_time_max_of_rescued": round(max(v.cpu_time for v in learned), 3) if learned else None,
            "healthy": len(good),
            "healthy_touched": sum(v.interventions > 0 for v in good),
            "healthy_identical": sum(v.rescued for v in good),
            "healthy_time_median": _median([v.time for v in good]),
            "healthy_cpu_time_median": _median([v.cpu_time for v in good]),
            "harmless_faults": len(survivors),
            "harmless_faults_kept": sum(v.rescued for v in survivors),
        }  # fmt: skip
    return summary


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} % [dim]{part}/{whole}[/]" if whole else "–"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def show_ablation(console: Console, results: Sequence[Result], summary: Summary) -> None:
    """Print what is lost without each rule, in runs of each kind."""
    whole = summary["evidence"]
    table = Table(title="What each rule earns", title_justify="left", box=SIMPLE_HEAD)
    columns = ("rescued", "difference", *groups(results), "healthy touched", "time, median*", "largest*")
    table.add_column("guard")
    for column in columns:
        table.add_column(column, justify="right")
    for row in summary.values():
        kinds = (row["groups"][group][0] - whole["groups"][group][0] for group in groups(results))
        table.add_row(
            row["title"], _share(row["rescued"], row["failing"]),
            "" if row is whole else f"{row['rescued'] - whole['rescued']:+d}",
            *("" if row is whole or not kind else f"{kind:+d}" for kind in kinds),
            str(row["healthy_touched"]), _number(row["cpu_time_median_of_rescued"], ".2f"),
            _number(row["cpu_time_max_of_rescued"], ".2f"),
        )  # fmt: skip
    console.print(table)
    console.print("*: processor time of rescued runs over the twin's", style="dim")


def show(console: Console, results: Sequence[Result], summary: Summary, facts: dict[str, Any]) -> None:
    """Print both tables and what was left out."""
    if failing(results):
        table = Table(title="Failing runs rescued", title_justify="left", box=SIMPLE_HEAD)
        table.add_column("fault")
        for row in summary.values():
            table.add_column(row["title"], justify="right", no_wrap=True)
        for group in groups(results):
            table.add_row(group, *(_share(*row["groups"][group]) for row in summary.values()))
        table.add_section()
        rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
            ("[bold]all", lambda row: "[bold]" + _share(row["rescued"], row["failing"])),
            ("data faults as good as twin", lambda row: "–" if row["data_kept"] is None
             else _share(row["data_kept"], row["data_faults"])),
            ("regained, median", lambda row: _number(row["regained_median"], ".2f")),
            ("interventions, mean", lambda row: _number(row["interventions_mean"], ".1f")),
            ("steps lost, mean*", lambda row: _number(row["steps_lost_mean"], ".0f")),
            ("time, median*", lambda row: _number(row["time_median_of_rescued"], ".2f")),
            ("time, largest*", lambda row: _number(row["time_max_of_rescued"], ".2f")),
            ("processor time, median*", lambda row: _number(row["cpu_time_median_of_rescued"], ".2f")),
            ("processor time, largest*", lambda row: _number(row["cpu_time_max_of_rescued"], ".2f")),
        ]  # fmt: skip
        for label, cell in rows:
            table.add_row(label, *map(cell, summary.values()))
        console.print(table)
        console.print("regained: share of the twin's improvement of the held-out loss; time: over the twin's; "
                      "*: of rescued runs", style="dim")  # fmt: skip
    if healthy(results):
        table = Table(title="Healthy runs", title_justify="left", box=SIMPLE_HEAD)
        for column in ("contender", "no intervention", "bit-identical", "time", "processor time"):
            table.add_column(column, justify="left" if column == "contender" else "right")
        for row in summary.values():
            table.add_row(
                row["title"], _share(row["healthy"] - row["healthy_touched"], row["healthy"]),
                _share(row["healthy_identical"], row["healthy"]), _number(row["healthy_time_median"], ".2f"),
                _number(row["healthy_cpu_time_median"], ".2f"),
            )  # fmt: skip
        console.print(table)
    harmless = [name for r in results for name, _ in r.survivors]
    never = [r.case for r in results if r.group != "healthy" and not r.fails]
    if harmless:
        kept = summary.get("evidence")
        saved = kept and f"; NaNGuard on evidence keeps {kept['harmless_faults_kept']} of {kept['harmless_faults']}"
        console.print(f"{len(harmless)} draws survive without help and were drawn anew{saved or ''}")
    if never:
        console.print(f"[yellow]left out, no draw fails: {', '.join(never)}")
    dull = [r.case for r in results if r.group not in ("healthy", "hopeless") and not r.learns]
    if dull:
        console.print(f"[yellow]the twin does not learn: {', '.join(dull)}")
    console.print(f"{facts['date']}, {facts['machine']}, {facts['seeds']} seeds, {facts['seconds']:.0f} s", style="dim")


def show_failures(console: Console, results: Sequence[Result]) -> None:
    """Print what became of every run the guard did not save, and of every healthy one it touched."""
    for result in results:
        for name in SETTINGS:
            verdict = result.verdicts.get(name)
            if verdict is None:
                continue
            if result.group == "healthy":
                good = verdict.rescued and not verdict.interventions
            else:
                good = verdict.rescued and (not result.harms_data or kept_data(verdict))
            if not good:
                _show_failure(console, result, verdict)


def _show_failure(console: Console, result: Result, verdict: Verdict) -> None:
    console.rule(f"{result.case}, {EVERYONE[verdict.contender].title}", align="left")
    console.print(result.description, style="dim", highlight=False)
    console.print(f"regained {verdict.regained:.3f} of {result.initial:.4g} → {result.twin:.4g}, "
                  f"ended at {verdict.final:.4g}; identical or rescued: {verdict.rescued}; "
                  f"poisoned: {', '.join(verdict.poisoned) or 'nothing'}; error: {verdict.error}",
                  highlight=False)  # fmt: skip
    console.print("losses " + " ".join(f"{x:.3g}" for x in verdict.losses), highlight=False)
    bare = result.verdicts.get("bare")
    if bare is not None and result.group != "healthy":
        console.print("bare   " + " ".join(f"{x:.3g}" for x in bare.losses), style="dim", highlight=False)
    for act in verdict.acts[:30]:
        console.print(f"  {act}", highlight=False, markup=False)
    if len(verdict.acts) > 30:
        console.print(f"  … {len(verdict.acts) - 30} more")


def brief(result: Result) -> dict[str, Any]:
    """A case as it stands in ``rescue.json``: numbers that are not finite become ``None``."""
    return {
        "case": result.case,
        "group": result.group,
        "fails": result.fails,
        "learns": result.learns,
        "initial": _finite(result.initial),
        "twin": _finite(result.twin),
        "survivors": [name for name, _ in result.survivors],
        "verdicts": {name: {
            "rescued": v.rescued, "regained": _finite(v.regained), "within_spread": v.within_spread,
            "interventions": v.interventions, "steps_lost": v.steps_lost, "time": round(v.time, 3),
            "cpu_time": round(v.cpu_time, 3), "error": v.error[0] if v.error else None,
        } for name, v in result.verdicts.items()},
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def plot(results: Sequence[Result], summary: Summary, path: Path) -> None:
    """Shares by fault and contender, and how close saved runs come to their twins."""
    from matplotlib.figure import Figure

    names, headings = list(summary), groups(results)
    figure = Figure(figsize=(11, 0.55 * max(4, len(headings)) + 1.6), layout="constrained")
    shares, curves = figure.subplots(1, 2, width_ratios=(1.25, 1))
    grid = [[_ratio(summary[n]["groups"][g]) for n in names] for g in headings]
    grid.append([summary[n]["share"] or 0.0 for n in names])
    shares.imshow(grid, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto", alpha=0.75)
    for i, line in enumerate(grid):
        for j, value in enumerate(line):
            shares.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=9)
    shares.set_xticks(range(len(names)), names, rotation=30, ha="right")
    shares.set_yticks(range(len(grid)), [*headings, "all"])
    shares.set_title("failing runs rescued, %")
    for name in names:
        values = sorted((min(1.2, max(-0.2, v.regained)) for v in _of(failing(results), name)), reverse=True)
        strong = name in SETTINGS
        curves.plot([100 * (i + 1) / len(values) for i in range(len(values))], values, label=name,
                    linewidth=2.5 if strong else 1.2, zorder=3 if strong else 2)  # fmt: skip
    curves.axhline(0.9, color="grey", linewidth=0.7, linestyle=":")
    curves.set_xlabel("share of failing runs, %")
    curves.set_title("improvement over the twin's")
    if names:
        curves.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _ratio(counts: Sequence[int]) -> float:
    return counts[0] / counts[1] if counts[1] else 0.0
