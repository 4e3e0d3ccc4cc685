"""``nanguard samples``: the bad samples that runs have met."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_nanguard.cli.output import say, say_no_run
from lightning_nanguard.record.bad_samples import (
    BAD_SAMPLES_FILE,
    BadSample,
    describe_sample,
    merged,
    read_bad_samples,
    write_csv,
)
from lightning_nanguard.record.files import RECORDS_FILE, read_records
from lightning_nanguard.record.run_log import RUN_FILE, RunLog, earlier_parts, find_runs
from lightning_nanguard.record.text import counted
from lightning_nanguard.types import Intervention

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
    groups = [([where], str(where.parent))] if where.is_file() else _groups(where)
    if not groups and (where.is_file() or not any(where.rglob(RUN_FILE))):
        return say_no_run(where)
    if chosen.csv:
        each = dict.fromkeys(file for files, _ in groups for file in files)
        write_csv(merged(one for file in each for one in read_bad_samples(file)), sys.stdout)
        return 0
    status = 0
    for files, name in groups:
        met: list[BadSample] = [one for file in files for one in read_bad_samples(file)]
        found = merged(met)
        if not found:  # a run without bad samples has no such file
            say(f"nanguard: {', '.join(map(str, files))}: no bad sample in it can be read", file=sys.stderr)
            status = 2
            continue
        say(f"{name}: {counted(len(found), 'bad sample')}")
        for one in found:
            say(f"  {describe_sample(one)}")
    if not groups:
        say("nanguard: no bad sample was found")
        if any(one.finding is not None and one.finding.rows for one in _records(where)):
            say("Rows that explain names are samples whose loss or gradient failed. No bad number was found in them.")
    return status


def _records(where: Path) -> list[Intervention]:
    return [one for file in where.rglob(RECORDS_FILE) for one in read_records(file)]


def _groups(where: Path) -> list[tuple[list[Path], str]]:
    """The files of each run with its name; a resumed run is one, with the folders that it lay in before."""
    logs: dict[str, RunLog] = {log.run_id: log for log in find_runs(where)}  # the part that was resumed last
    groups = []
    for log in logs.values():
        folders = [part.folder for part in (*earlier_parts(log), log)]
        files = [folder / BAD_SAMPLES_FILE for folder in folders if (folder / BAD_SAMPLES_FILE).is_file()]
        if files:
            before = f" (and before it was resumed in {', '.join(map(str, folders[:-1]))})" if folders[1:] else ""
            groups.append((files, f"{log.folder}{before}"))
    grouped = {file.resolve() for files, _ in groups for file in files}
    alone = (file for file in sorted(where.rglob(BAD_SAMPLES_FILE)) if file.resolve() not in grouped)
    return sorted([*groups, *(([file], str(file.parent)) for file in alone)], key=lambda group: group[1])
