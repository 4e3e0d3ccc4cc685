"""``nanguard report``: the page of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_nanguard.cli.output import say_no_run, write_page
from lightning_nanguard.report.data import find_run, read_run_data
from lightning_nanguard.report.page import page

NAME = "report"
HELP = "write the page of a run, with curves, interventions, causes and costs: one file to read offline"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "run_folder",
        metavar="run",
        type=Path,
        help="folder of a run, or a folder with runs below it, of which the newest is taken",
    )
    parser.add_argument(
        "-o", "--output", type=Path, help="file or folder to write to (default: report.html in the folder of the run)"
    )


def run(chosen: argparse.Namespace) -> int:
    """Write the page, and say where."""
    folder = find_run(chosen.run_folder)
    if folder is None:
        return say_no_run(chosen.run_folder)
    text = page(read_run_data(folder))
    write_page(chosen.output or folder, text, "report.html")
    return 0
