"""``nanguard last-good``: the checkpoint a run can go on from."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_nanguard.cli.output import say

if TYPE_CHECKING:
    from lightning_nanguard.checkpoints.inspection import Inspection

NAME = "last-good"
HELP = "print the newest good checkpoint of the newest run, for ckpt_path"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run_folder", metavar="run", type=Path, help="folder of a run, or a folder with runs below it")


def run(chosen: argparse.Namespace) -> int:
    """Print the path that ``resume="last-good"`` takes, too, and nothing else, on standard output."""
    from lightning_nanguard.checkpoints.inspection import folders_of_run, inspect, newest_good
    from lightning_nanguard.record.files import LAST_GOOD
    from lightning_nanguard.record.run_log import find_runs, with_earlier_parts

    where: Path = chosen.run_folder
    logs = find_runs(where)
    runs = {log.run_id: log for log in logs}  # of a run in several folders the part that was resumed last
    for number, log in enumerate(reversed(runs.values())):
        parts = with_earlier_parts(one for one in logs if one.run_id == log.run_id)
        folders = [folder for part in parts for folder in folders_of_run(part)]
        found = newest_good(folders, logs=parts, run=log.run_id)
        kept = log.folder / LAST_GOOD
        known = inspect(kept) if kept.exists() else None
        if known is not None and not known.good():
            say(f"nanguard: {kept} is bad: {known.damage or ', '.join(known.tensors)}", file=sys.stderr)
        if found is not None:
            if number:
                say(f"nanguard: no good checkpoint of the newest run; this is one of run {log.run_id}", file=sys.stderr)
            return _print(found, known, where)
    kept_files = set(where.rglob(LAST_GOOD)) - {log.folder / LAST_GOOD for log in runs.values()}
    for file in sorted(kept_files):
        if not (one := inspect(file)).good():
            say(f"nanguard: {file} is bad: {one.damage or ', '.join(one.tensors)}", file=sys.stderr)
    found = newest_good([where, *(folder for folder in where.rglob("*") if folder.is_dir())])
    if found is not None:
        say("nanguard: no run of NaNGuard there has a good checkpoint; this one is in no run's log", file=sys.stderr)
        return _print(found, None, where)
    say(
        f"nanguard: there is no good checkpoint in {where} or below it. ModelCheckpoint saves some, and "
        "NaNGuard(last_good_every_n_steps=…) keeps one of a certified state.",
        file=sys.stderr,
    )
    return 2


def _print(found: Inspection, kept: Inspection | None, where: Path) -> int:
    size = found.path.stat().st_size
    say(f"step {found.global_step}, {size:,} bytes; whole and finite", file=sys.stderr)
    if kept is not None and kept.good() and kept.path.resolve() != found.path:
        say(
            f"The state in {kept.path} (step {kept.global_step}) was certified: there was no fault and no suspicion in "
            "the updates after it. Take that one if the loss has risen since then.",
            file=sys.stderr,
        )
    print(_shown(found.path, where))
    return 0


def _shown(path: Path, where: Path) -> Path:
    """The path as the user wrote that of the folder."""
    root = where.resolve()
    return where / path.relative_to(root) if path.is_relative_to(root) else path
