"""``python -m benchmarks.diagnose``: the confusion table."""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.processes import results as results_of

from .healthy import NAMES
from .measuring import FORMS, Job, Result, Seen, measure
from .others import OTHERS

FIRST_SEED = {"tune": 0, "report": 1_200_000}
"""Where each set of seeds begins; nothing was chosen by looking at the second."""


def main(argv: list[str] | None = None) -> int:
    """Measure, show, write. What was measured lies in a file beside the output until that is whole."""
    parser = argparse.ArgumentParser(prog="benchmarks.diagnose", description=main.__doc__)
    parser.add_argument("--seeds", choices=sorted(FIRST_SEED), default="report", help="which set of seeds")
    parser.add_argument("--draws", type=int, default=5, help="seeds of each form")
    parser.add_argument("--cases", default=".", help="pattern of the forms, as cause/name, or of healthy ones")
    parser.add_argument("--healthy", type=int, default=1, help="seeds of each healthy form; 0 leaves them out")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/diagnose.json"))
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run of the same kind ended")
    parser.add_argument("--show-failures", action="store_true")
    arguments = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 150)
    first, pattern = FIRST_SEED[arguments.seeds], re.compile(arguments.cases)
    forms = [(True, name, arguments.draws) for name in FORMS if pattern.search(name)]
    forms += [(False, name, arguments.healthy) for name in NAMES if pattern.search(name)]
    # The first seed of every form comes first, so that an interrupted run has something of each.
    jobs = [
        Job(fails, name, first + draw)
        for draw in range(max(arguments.draws, arguments.healthy))
        for fails, name, draws in forms
        if draw < draws
    ]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    partial = arguments.output.with_suffix(".partial.jsonl")
    done = _read(partial) if arguments.resume else {}
    with partial.open("a" if arguments.resume else "w") as lines:
        for seen in _measured([job for job in jobs if job not in done], arguments.jobs, console):
            done[seen.job] = seen
            lines.write(json.dumps(asdict(seen)) + "\n")
            lines.flush()
    order = {name: index for index, (_, name, _) in enumerate(forms)}
    whole = sorted((done[job] for job in jobs), key=lambda seen: (order[seen.job.form], seen.job.seed))
    results = [seen.result for seen in whole if seen.result is not None]
    well = [(seen.job.form, seen.job.seed, list(seen.causes)) for seen in whole if not seen.job.fails]
    about = {
        "date": date.today().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "seeds": arguments.seeds,
        "first_seed": first,
        "runs": len(results),
        "healthy_runs": len(well),
        "processes": arguments.jobs,
        "cpu_seconds": round(sum(seen.seconds for seen in whole)),
    }
    show(console, results, well)
    if arguments.show_failures:
        for one in results:
            if one.said != one.cause or one.place is False or one.samples is False:
                console.print(f"{one.form} {one.seed}: {one.said or 'nothing'} {one.place} {one.samples} {one.text}")
    arguments.output.write_text(
        json.dumps({"about": about, "rows": rows(results), "healthy": [*map(list, well)],
                    "runs": [_brief(one) for one in results]}, indent=1)
    )  # fmt: skip
    partial.unlink()
    console.print(
        f"{arguments.output} written; {about['runs']} failing and {about['healthy_runs']} healthy runs, "
        f"{about['cpu_seconds']} s of processor time"
    )
    return 0


def rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """One row a cause, and one for all of them."""
    results = list(results)
    causes = list(dict.fromkeys(one.form.partition("/")[0] for one in results))
    rows = [_row(cause, [one for one in results if one.form.startswith(f"{cause}/")]) for cause in causes]
    return [*rows, _row("all", results)]


def _row(cause: str, results: list[Result]) -> dict[str, Any]:
    wrong = Counter(one.said or "nothing" for one in results if one.said != one.cause)
    row: dict[str, Any] = {
        "cause": cause,
        "forms": len({one.form for one in results}),
        "runs": len(results),
        "right": sum(one.said == one.cause for one in results),
        "place": _share(one.place for one in results),
        "samples": _share(one.samples for one in results),
        "instead": dict(wrong),
    }
    for tool in OTHERS:
        row[tool] = _share(one.others[tool] for one in results)
    return row


def _share(answers: Iterable[bool | None]) -> tuple[int, int]:
    known = [one for one in answers if one is not None]
    return sum(known), len(known)


def show(console: Console, results: list[Result], well: list[tuple[str, int, list[str]]]) -> None:
    """Print the table."""
    table = Table(title="First-ranked cause, place and samples; places that other tools name", title_justify="left")
    for name in ("cause", "runs", "right", "place", "samples", *OTHERS, "said instead"):
        table.add_column(name, justify="left" if name in ("cause", "said instead") else "right")
    for row in rows(results):
        if row["cause"] == "all":
            table.add_section()
        instead = ", ".join(f"{name} {count}" for name, count in row["instead"].items())
        told = [_told(row[name]) for name in ("place", "samples", *OTHERS)]
        table.add_row(
            row["cause"], str(row["runs"]), str(row["right"]), *told, instead if row["cause"] != "all" else ""
        )
    console.print(table)
    loud = [(name, seed, causes) for name, seed, causes in well if causes]
    if well:
        console.print(f"healthy runs: {len(well)}, with a finding above low confidence: {len(loud)}")
    for name, seed, causes in loud:
        console.print(f"  {name} {seed}: {', '.join(causes)}")


def _told(share: tuple[int, int]) -> str:
    return f"{share[0]}/{share[1]}" if share[1] else "–"


def _brief(one: Result) -> dict[str, Any]:
    return {key: value for key, value in asdict(one).items() if key != "text"}


def _read(path: Path) -> dict[Job, Seen]:
    lines = path.read_text().splitlines() if path.exists() else []
    # The last line of a run that was killed may be torn.
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    seen = [
        Seen(
            Job(**one["job"]),
            one["seconds"],
            None if one["result"] is None else Result(**one["result"]),
            tuple(one["causes"]),
        )
        for one in whole
    ]
    return {one.job: one for one in seen}


def _measured(jobs: list[Job], workers: int, console: Console) -> Iterator[Seen]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("diagnose", total=len(jobs))
        for seen in results_of(measure, jobs, workers):
            progress.advance(bar)
            yield seen


if __name__ == "__main__":
    raise SystemExit(main())
