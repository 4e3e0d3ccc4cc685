"""The ``nanguard`` command: what a guard did, in words, and where a run can go on from."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_nanguard.journal import describe, read_records

_NAME = "interventions.jsonl"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Command line without the program's name; ``None`` takes it from ``sys.argv``.

    Returns:
        Exit status: 0, or 2 where nothing was found.
    """
    parser = argparse.ArgumentParser(prog="nanguard", description="What a guard did to a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    explain = commands.add_parser("explain", help="print every record of a run, in words")
    explain.add_argument("run", type=Path, help=f"folder of the run (searched for {_NAME}), or the file itself")
    last = commands.add_parser("last-good", help="print the newest good checkpoint that the guard kept, for ckpt_path")
    last.add_argument("run", type=Path, help="folder of the run, or of many: it is searched with all below it")
    chosen = parser.parse_args(arguments)
    return _last_good(chosen.run) if chosen.command == "last-good" else _explain(chosen.run)


def _explain(run: Path) -> int:
    files = [run] if run.is_file() else sorted(run.rglob(_NAME))
    if not files:
        print(
            f"nanguard: no {_NAME} in {run}: either the guard had nothing to do there, or its records lie "
            "elsewhere (NaNGuard's dirpath).",
            file=sys.stderr,
        )
        return 2
    for file in files:
        if len(files) > 1:
            print(f"{file}:")
        for record in read_records(file):
            print(describe(record))
    return 0


def _last_good(run: Path) -> int:
    from lightning_nanguard.checkpoints import LAST_GOOD, inspect, newest_good  # torch takes a second to import

    kept = sorted(run.rglob(LAST_GOOD), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    for file in kept:
        found = inspect(file)
        if found.good():
            print(file)
            print(f"step {found.global_step}, {file.stat().st_size:,} bytes; whole and finite", file=sys.stderr)
            return 0
        print(f"nanguard: {file} is bad: {found.damage or ', '.join(found.tensors)}", file=sys.stderr)
    if not kept:
        print(
            f"nanguard: no {LAST_GOOD} in {run}: NaNGuard(last_good_every_n_steps=…) writes one, once its state is "
            "certified.",
            file=sys.stderr,
        )
    other = newest_good([run, *(folder for folder in run.rglob("*") if folder.is_dir())])
    if other is not None:
        print(
            f"nanguard: the newest good checkpoint there is {other.path} of step {other.global_step}", file=sys.stderr
        )
    return 2


if __name__ == "__main__":
    sys.exit(main())
