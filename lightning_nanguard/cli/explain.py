"""``nanguard explain``: the records of a run in words."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_nanguard.record.files import ADVICE_FILE, RECORDS_FILE, read_advice, read_records
from lightning_nanguard.record.messages import describe, describe_advice

NAME = "explain"
HELP = "print every record of a run with its finding, in words"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "run_folder",
        metavar="run",
        type=Path,
        help=f"folder of the run (searched for {RECORDS_FILE}), or the file itself",
    )


def run(chosen: argparse.Namespace) -> int:
    """Print one line for each record and each piece of advice."""
    where: Path = chosen.run_folder
    names = (RECORDS_FILE, ADVICE_FILE)
    files = [where] if where.is_file() else sorted(path for name in names for path in where.rglob(name))
    if not files:
        print(
            f"nanguard: no {RECORDS_FILE} in {where}: either the guard had nothing to do there, or its records lie "
            "elsewhere (NaNGuard's dirpath).",
            file=sys.stderr,
        )
        return 2
    for file in files:
        if len(files) > 1:
            print(f"{file}:")
        advice = file.name == ADVICE_FILE
        for line in map(describe_advice, read_advice(file)) if advice else map(describe, read_records(file)):
            print(line)
    return 0
