"""``nanguard report``: the page of a run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from lightning_nanguard.cli.output import say, say_no_run
from lightning_nanguard.report.data import find_run, read_run_data
from lightning_nanguard.report.page import page

NAME = "report"
HELP = "write the page of a run: curves, interventions with their causes and costs; one file to open offline"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "run_folder", metavar="run", type=Path, help="folder of the run, or of many: the newest run is taken"
    )
    parser.add_argument("-o", "--output", type=Path, help="file to write (report.html in the folder of the run)")


def run(chosen: argparse.Namespace) -> int:
    """Write the page, and say where."""
    folder = find_run(chosen.run_folder)
    if folder is None:
        return say_no_run(chosen.run_folder)
    text = page(read_run_data(folder))
    output: Path = chosen.output or folder / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    new = output.with_name(f"{output.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, output)
    say(str(output))
    return 0
