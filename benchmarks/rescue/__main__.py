"""``python -m benchmarks.rescue``."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.processes import results as results_of

from . import report
from .ablation import ABLATIONS, EVERYONE
from .arc import Arc, arc_python
from .cases import FAILING, HEALTHY, Form
from .contenders import CONTENDERS, MODES
from .measuring import Result, jobs, measure, prepare
from .realistic.catalogue import REALISTIC, TWINS

FIRST_SEED = {"tune": 0, "report": 505_000}
"""Where each set of seeds begins; ``--seed`` moves on by a thousand, so that the sets never meet."""

GROUPS = {"home": (FAILING, HEALTHY), "realistic": (REALISTIC, TWINS)}
"""Failing and healthy forms, by the value of ``--group``."""


def main(argv: list[str] | None = None) -> int:
    """Measure, show, write."""
    arguments = _parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 130)
    chosen, healthy = ([f for f in forms if re.search(arguments.cases, f.name) and _fits(f, arguments.processes)]
                       for forms in GROUPS[arguments.group])  # fmt: skip
    if arguments.only == "failing":
        healthy = []
    elif arguments.only == "healthy":
        chosen = []
    if arguments.fast:
        chosen, healthy = chosen[::18], healthy[::18]
    if arguments.list:
        for form in (*chosen, *healthy):
            console.print(form.name, highlight=False)
        console.print(f"{len(chosen)} failing forms, {len(healthy)} healthy ones")
        return 0
    once = arguments.fast or arguments.group == "realistic"
    draws = arguments.draws or (len(chosen) if once else 300)
    first = FIRST_SEED[arguments.seeds] + 1000 * arguments.seed
    contenders = ["evidence", *ABLATIONS] if arguments.ablation else _contenders(arguments.contenders)
    todo = jobs(chosen, healthy, draws, first, contenders, arguments.processes)
    started = time.perf_counter()
    results: list[Result] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("rescue", total=len(todo))
        lines = arguments.jsonl.open("w") if arguments.jsonl else None
        for result in results_of(measure, todo, arguments.jobs, prepare):
            results.append(result)
            progress.advance(bar)
            if lines:
                lines.write(json.dumps(asdict(result)) + "\n")
                lines.flush()
    order = {(job.form, seed): i for i, job in enumerate(todo) for seed in job.seeds}
    results.sort(key=lambda r: order[r.case.rpartition("#")[0], int(r.case.rpartition("#")[2])])
    summary = report.summarise(results)
    about = report.about(arguments.seeds, first, time.perf_counter() - started)
    if arguments.ablation:
        report.show_ablation(console, results, summary)
    else:
        report.show(console, results, summary, about)
    if arguments.show_failures:
        report.show_failures(console, results)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"about": about, "contenders": summary,
                                            "cases": [report.brief(r) for r in results]}, indent=1))  # fmt: skip
    report.plot(results, summary, arguments.output.with_suffix(".png"))
    console.print(f"{arguments.output} and {arguments.output.with_suffix('.png').name} written")
    return 0


def _fits(form: Form, processes: int) -> bool:
    """Whether a form can be trained so: DDP has no manual optimization of one of two nets."""
    return processes == 1 or form.task != "gan"


def _contenders(names: str) -> list[str]:
    wanted = [n for n in names.split(",") if n] or [*CONTENDERS, *([Arc.name] if arc_python() else [])]
    unknown = set(wanted) - set(EVERYONE)
    if unknown:
        sys.exit(f"no contender is named {', '.join(sorted(unknown))}; there are {', '.join(EVERYONE)}")
    return wanted


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.rescue", description="Which failing runs are saved.")
    parser.add_argument("--fast", action="store_true", help="every eighteenth form, once")
    parser.add_argument("--seed", type=int, default=0, help="other draws of the same forms")
    parser.add_argument("--seeds", choices=sorted(FIRST_SEED), default="report", help="set of seeds (default: report)")
    parser.add_argument(
        "--draws",
        type=int,
        default=0,
        help="failing runs (default: 300; one a form with --fast and of realistic models)",
    )
    parser.add_argument(
        "--group", choices=sorted(GROUPS), default="home", help="small models or realistic ones (default: home)"
    )
    parser.add_argument("--cases", default="", metavar="REGEX", help="only forms whose name matches")
    parser.add_argument("--only", choices=("failing", "healthy"), help="leave the other kind out")
    parser.add_argument(
        "--contenders", default="", metavar="A,B", help=f"of {', '.join([*CONTENDERS, *MODES, Arc.name])}"
    )
    parser.add_argument("--ablation", action="store_true", help="the guard without one rule at a time instead")
    parser.add_argument("--processes", type=int, default=1, help="ranks of each run, over gloo (default: 1)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/rescue.json"), metavar="JSON")
    parser.add_argument("--jsonl", type=Path, help="every verdict in full, a case a line")
    parser.add_argument("--list", action="store_true", help="list the forms and stop")
    parser.add_argument("--show-failures", action="store_true", help="say what became of what the guard did not save")
    return parser


if __name__ == "__main__":
    sys.exit(main())
