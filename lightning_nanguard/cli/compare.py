"""``nanguard compare``: runs side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_nanguard.cli.output import say, say_no_run, say_table, write_page
from lightning_nanguard.record.curve import CURVE_FILE
from lightning_nanguard.report.comparison import compare, comparison_page, names_of
from lightning_nanguard.report.data import find_run, read_run_data

NAME = "compare"
HELP = "show runs side by side: how each went, what the guard did, and which settings differ"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "run_folders",
        metavar="run",
        type=Path,
        nargs="+",
        help="folders of two or more runs; of a folder with many runs, the newest is taken",
    )
    parser.add_argument("-o", "--output", type=Path, help="also write a page with the curves of all runs")


def run(chosen: argparse.Namespace) -> int:
    """Print the table, and write the page where one is asked for."""
    folders: list[Path] = []
    for where in chosen.run_folders:
        folder = find_run(where)
        if folder is None:
            return say_no_run(where)
        if not any(folder.samefile(other) for other in folders):
            folders.append(folder)
    if len(folders) < 2:
        say(
            "nanguard: compare takes the newest run of each folder: name two or more folders of runs. There is only "
            f"one run, {folders[0]}",
            file=sys.stderr,
        )
        return 2
    for folder in folders:
        if not (folder / CURVE_FILE).is_file():
            say(f"nanguard: there is no {CURVE_FILE} in {folder}: its steps and losses are not known", file=sys.stderr)
    names, runs = names_of(folders), [read_run_data(folder) for folder in folders]
    say_table([["", *names], *([label, *values] for label, values in compare(runs))])
    if chosen.output is not None:
        write_page(chosen.output, comparison_page(names, runs), "compare.html")
    return 0
