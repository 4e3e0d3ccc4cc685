"""``nanguard last-good``: the checkpoint a run can go on from."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_nanguard.cli.output import say

NAME = "last-good"
HELP = "check the newest last good checkpoint, and print its path"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run_folder", metavar="run", type=Path, help="folder of a run, or a folder with runs below it")


def run(chosen: argparse.Namespace) -> int:
    """Print the path of the newest file that is whole and finite, and nothing else, on standard output."""
    from lightning_nanguard.checkpoints.inspection import inspect, newest_good
    from lightning_nanguard.record.files import LAST_GOOD

    where: Path = chosen.run_folder
    kept = sorted(where.rglob(LAST_GOOD), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    for file in kept:
        found = inspect(file)
        if found.good():
            print(file)
            print(f"step {found.global_step}, {file.stat().st_size:,} bytes; whole and finite", file=sys.stderr)
            return 0
        say(f"nanguard: {file} is bad: {found.damage or ', '.join(found.tensors)}", file=sys.stderr)
    if not kept:
        print(
            f"nanguard: there is no {LAST_GOOD} in {where}. NaNGuard(last_good_every_n_steps=…) writes one when its "
            "state is certified.",
            file=sys.stderr,
        )
    other = newest_good([where, *(folder for folder in where.rglob("*") if folder.is_dir())])
    if other is not None:
        print(f"nanguard: the newest good checkpoint there is {other.path} (step {other.global_step})", file=sys.stderr)
    return 2
