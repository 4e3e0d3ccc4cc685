"""``nanguard samples``: the bad samples that runs have met."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_nanguard.cli.output import say, say_no_run
from lightning_nanguard.record.bad_samples import (
    BAD_SAMPLES_FILE,
    describe_sample,
    merged,
    read_bad_samples,
    write_csv,
)
from lightning_nanguard.record.run_log import RUN_FILE
from lightning_nanguard.record.text import counted

NAME = "samples"
HELP = "list the bad samples that the guard found in a run, by their rows in the data set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "run_folder",
        metavar="run",
        type=Path,
        help=f"folder of a run, or a folder with runs below it, or one file {BAD_SAMPLES_FILE}",
    )
    parser.add_argument("--csv", action="store_true", help="print CSV")


def run(chosen: argparse.Namespace) -> int:
    """Print each bad sample once; with several runs together, since they most likely read the same data."""
    where: Path = chosen.run_folder
    files = [where] if where.is_file() else sorted(where.rglob(BAD_SAMPLES_FILE))
    if not files and not any(where.rglob(RUN_FILE)):
        return say_no_run(where)
    if chosen.csv:
        write_csv(merged(one for file in files for one in read_bad_samples(file)), sys.stdout)
        return 0
    for file in files:
        found = merged(read_bad_samples(file))
        say(f"{file.parent}: {counted(len(found), 'bad sample')}")
        for one in found:
            say(f"  {describe_sample(one)}")
    if not files:
        say("nanguard: no bad sample was found")
    return 0
