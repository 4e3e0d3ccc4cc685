"""Tables and figures of what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .judging import upper_bound
from .measuring import EVERYONE
from .store import Outcome

Summary = dict[str, dict[str, Any]]


def summarise(outcomes: Sequence[Outcome]) -> Summary:
    """Figures of each contender, in all and by group."""
    summary: Summary = {}
    too_high = {o.case for o in outcomes if o.contender == "bare" and not o.regains}
    for name in EVERYONE:
        own = [o for o in outcomes if o.contender == name]
        if own:
            kinds = dict.fromkeys(o.kind for o in own)
            summary[name] = {
                "title": EVERYONE[name].title,
                **_counts(own),
                "too_high": _counts([o for o in own if o.case in too_high]),
                "repeated": sum(o.repeated for o in own),
                "time_median": round(median(o.time for o in own), 3),
                "groups": {kind: _counts([o for o in own if o.kind == kind]) for kind in kinds},
            }
    return summary


def _counts(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    touched, harmed = sum(o.touched for o in outcomes), sum(o.harmed for o in outcomes)
    of = len(outcomes)
    return {
        "draws": of,
        "touched": touched,
        "harmed": harmed,
        "improved": sum(o.improved for o in outcomes),
        "better_at_lower_rate": sum(o.touched and o.better_at_lower_rate for o in outcomes),
        "touched_at_most": round(upper_bound(touched, of), 5),
        "harmed_at_most": round(upper_bound(harmed, of), 5),
    }


def show(console: Console, summary: Summary, facts: dict[str, Any]) -> None:
    """Print the groups, a pair of columns a contender: touched and harmed."""
    table = Table(title="Healthy runs touched, and harmed", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("healthy runs")
    table.add_column("draws", justify="right")
    for row in summary.values():
        table.add_column(row["title"], justify="right")
    for kind in dict.fromkeys(kind for row in summary.values() for kind in row["groups"]):
        cells = [row["groups"].get(kind) for row in summary.values()]
        table.add_row(kind, _draws(cells), *map(_cell, cells))
    table.add_section()
    rows = list(summary.values())
    table.add_row("[bold]all", _draws(rows), *(f"[bold]{_cell(row)}" for row in rows))
    table.add_row("touched, at most (95 %)", "", *(f"{100 * row['touched_at_most']:.2f} %" for row in rows))
    table.add_row("harmed, at most (95 %)", "", *(f"{100 * row['harmed_at_most']:.2f} %" for row in rows))
    table.add_row("draws at a rate that is too high", "", *(str(row["too_high"]["draws"]) for row in rows))
    table.add_row("touched, harmed of these", "", *(_cell(row["too_high"]) for row in rows))
    table.add_row("touched and better", "", *(str(row["improved"]) for row in rows))
    table.add_row("touched and better at a lower rate", "", *(str(row["better_at_lower_rate"]) for row in rows))
    table.add_row("batches run again", "", *(str(row["repeated"]) for row in rows))
    table.add_row("processor time, median", "", *(f"{row['time_median']:.2f}" for row in rows))
    console.print(table)
    console.print(
        "touched: anything was done, or any bit of the end differs from the bare run; harmed, after the comma: worse "
        "than it by more than the range of five reseeded twins; better: the other way round; better at a lower rate: "
        "the bare run is better in this sense at 1/4, 1/16 or 1/64 of its rate; a rate that is too high: the bare run "
        "gains less than 90 % of what it gains at one of these rates, so that it would count as a failing run",
        style="dim",
    )
    console.print(f"{facts['set_aside']} draws whose bare run is not healthy were set aside; {facts['date']}, "
                  f"{facts['machine']}, {facts['seeds']} seeds, version {facts['version']}", style="dim")  # fmt: skip


def _draws(cells: Iterable[dict[str, Any] | None]) -> str:
    counts = sorted({cell["draws"] for cell in cells if cell})
    return "–".join(map(str, counts[:1] + counts[-1:] if len(counts) > 1 else counts))


def _cell(counts: dict[str, Any] | None) -> str:
    if counts is None:
        return "–"
    return f"{counts['touched']}, {counts['harmed']}" if counts["touched"] else "0"


def touched(outcomes: Iterable[Outcome], contenders: Iterable[str]) -> list[str]:
    """A line for every run that was touched: what was done, and how it ended."""
    names = set(contenders)
    lines = []
    for o in outcomes:
        if o.contender in names and o.touched:
            word = "harmed" if o.harmed else "better" if o.improved else "touched"
            acts = "; ".join(f"{step} {fault}: {remedies}" for step, fault, remedies in o.acts)
            spread = f"{min(o.twins):.5g}…{max(o.twins):.5g}" if o.twins else "not asked"
            lines.append(
                f"{o.case} [{o.contender}] {word}: {o.interventions} interventions ({acts}), loss {o.initial:.5g} → "
                f"{o.final:.5g}, bare {o.bare:.5g}, twins {spread}"
                + (f", at lower rates {min(o.lower):.5g}" if o.lower else "")
                + (f", {o.error}" if o.error else "")
            )
    return lines
