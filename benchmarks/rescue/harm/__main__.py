"""``python -m benchmarks.rescue.harm``."""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.processes import results as results_of
from benchmarks.rescue import report as rescue_report
from benchmarks.rescue.arc import Arc, arc_python
from benchmarks.rescue.contenders import RIVALS, SETTINGS
from benchmarks.rescue.healthy import DRAWN
from benchmarks.rescue.measuring import prepare

from . import report
from .measuring import EVERYONE, Job, draw, measure
from .store import RESULTS, Outcome, Store, store_for, version

FIRST_SEED = {"tune": 0, "report": 505_000}
"""Where each set of seeds begins; ``--seed`` moves on by a thousand, so that the sets never meet."""


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing, show everything that was asked for."""
    arguments = _parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 130)
    if arguments.case:
        return _one(arguments.case, _contenders(arguments), console)
    forms = [f.name for f in DRAWN if re.search(arguments.forms, f.name)]
    if arguments.list:
        console.print("\n".join(forms), highlight=False)
        return 0
    forms = forms[::18] if arguments.fast else forms
    draws = arguments.draws or (len(forms) if arguments.fast else 1000)
    first = FIRST_SEED[arguments.seeds] + 1000 * arguments.seed
    wanted, contenders = cases(forms, draws, first), _contenders(arguments)
    started = time.perf_counter()
    kept: list[Outcome] = []
    for rivals in (False, True):
        names = [name for name in contenders if (name not in SETTINGS) == rivals]
        if names:
            store = store_for(arguments.seeds, arguments.results, rivals=rivals)
            some = wanted[: arguments.rival_draws] if rivals else wanted
            _gather(store, some, names, arguments.jobs, console)
            found = (store.outcomes.get((case, name)) for case in some for name in ("bare", *names))
            kept += [outcome for outcome in found if outcome is not None]
    facts = rescue_report.about(arguments.seeds, first, time.perf_counter() - started)
    unhealthy = {o.case for o in kept if o.contender == "bare" and not o.healthy}
    facts |= {"version": version(), "set_aside": len(unhealthy)}
    summary = report.summarise(kept)
    report.show(console, summary, facts)
    lines = report.touched(kept, [name for name in contenders if name in SETTINGS])
    for line in lines:
        console.print(line, highlight=False, markup=False)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"about": facts, "contenders": summary, "touched": lines}, indent=1))
        console.print(f"{arguments.output} written")
    return 0


def cases(forms: Sequence[str], draws: int, first: int) -> list[str]:
    """Names of ``draws`` cases: every form once, then every form with the next seed, from ``first`` on.

    The forms come in an order of chance that is always the same, so that a few draws already hold of all kinds.
    """
    mixed = random.Random(0).sample(forms, len(forms))
    return [f"{mixed[i % len(mixed)]}#{first + i // len(mixed)}" for i in range(draws if mixed else 0)]


def _contenders(arguments: argparse.Namespace) -> tuple[str, ...]:
    settings = {"both": tuple(SETTINGS), "none": ()}.get(arguments.act_on, (arguments.act_on,))
    others = [name for name in EVERYONE if name not in SETTINGS and (name != Arc.name or arc_python())]
    rivals = others if arguments.rivals == "all" else [name for name in arguments.rivals.split(",") if name]
    unknown = set(rivals) - set(EVERYONE)
    if unknown:
        sys.exit(f"no rival is named {', '.join(sorted(unknown))}; there are {', '.join(others)}")
    return (*settings, *rivals)


def _gather(store: Store, wanted: Sequence[str], contenders: Sequence[str], workers: int, console: Console) -> None:
    todo = [Job(case, missing) for case in wanted if (missing := store.missing(case, contenders))]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("harm", total=len(todo))
        for outcomes in results_of(measure, todo, min(workers, len(todo)), prepare):
            store.add(outcomes)
            progress.advance(bar)


def _one(name: str, contenders: Sequence[str], console: Console) -> int:
    """Measure one case, keep nothing, and print everything about it."""
    try:
        case = draw(name)
    except ValueError as error:
        sys.exit(str(error))
    prepare()
    console.print(repr(case), highlight=False, markup=False)
    outcomes = measure(Job(name, tuple(contenders)))
    for outcome in outcomes:
        console.print_json(json.dumps(asdict(outcome)))
    for line in report.touched(outcomes, contenders):
        console.print(line, highlight=False, markup=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.rescue.harm", description="Healthy runs that the guard touches, and those it harms."
    )
    parser.add_argument("--draws", type=int, default=0, help="healthy draws (default: 1000; with --fast one a form)")
    parser.add_argument(
        "--act-on", choices=("certain", "evidence", "both", "none"), default="both", help="default: both"
    )
    parser.add_argument(
        "--rivals", default="", metavar="A,B", help=f"all, or of {', '.join([*RIVALS, Arc.name])} (default: none)"
    )
    parser.add_argument("--rival-draws", type=int, default=300, help="of the draws, for the rivals (default: 300)")
    parser.add_argument("--seeds", choices=sorted(FIRST_SEED), default="report", help="set of seeds (default: report)")
    parser.add_argument("--seed", type=int, default=0, help="other draws of the same forms")
    parser.add_argument("--forms", default="", metavar="REGEX", help="only forms whose name matches")
    parser.add_argument("--fast", action="store_true", help="every eighteenth form, once")
    parser.add_argument("--case", metavar="FORM#SEED", help="only this case, with all that is known about it")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help=f"default: {RESULTS}")
    parser.add_argument("--output", type=Path, metavar="JSON", help="write the figures there")
    parser.add_argument("--list", action="store_true", help="list the forms and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
