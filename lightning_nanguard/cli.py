"""The ``nanguard`` command: it prints what a guard did, in words."""

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
        Exit status: 0, or 2 where no records were found.
    """
    parser = argparse.ArgumentParser(prog="nanguard", description="What a guard did to a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    explain = commands.add_parser("explain", help="print every record of a run, in words")
    explain.add_argument("run", type=Path, help=f"folder of the run (searched for {_NAME}), or the file itself")
    chosen = parser.parse_args(arguments)
    files = [chosen.run] if chosen.run.is_file() else sorted(chosen.run.rglob(_NAME))
    if not files:
        print(
            f"nanguard: no {_NAME} in {chosen.run}: either the guard had nothing to do there, or its records lie "
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


if __name__ == "__main__":
    sys.exit(main())
