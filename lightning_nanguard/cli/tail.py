"""``nanguard tail``: a live run, followed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, final

from lightning_nanguard.cli.explain import headline
from lightning_nanguard.cli.output import say, say_no_run
from lightning_nanguard.record.files import ADVICE_FILE, RECORDS_FILE, put_aside, read_whole, readable
from lightning_nanguard.record.messages import describe_advice, tell, tell_again
from lightning_nanguard.record.run_folder import is_alive
from lightning_nanguard.record.run_log import find_runs
from lightning_nanguard.report.data import read_run_data
from lightning_nanguard.types import Advice, Intervention, Kind

NAME = "tail"
HELP = "follow the newest run in a folder, and print each thing that the guard does"

_Record = TypeVar("_Record")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run_folder", metavar="run", type=Path, help="folder of a run, or a folder with runs below it")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds between two checks (default: 1)")


def run(chosen: argparse.Namespace) -> int:
    """Print what is on record and what comes, until the run ends or Ctrl-C is pressed."""
    runs = find_runs(chosen.run_folder)
    if not runs:
        return say_no_run(chosen.run_folder)
    folder = runs[-1].folder
    say(headline(read_run_data(folder)))
    records, advice = NewLines(folder / RECORDS_FILE), NewLines(folder / ADVICE_FILE)
    seen: set[Kind] = set()
    try:
        while True:
            alive = is_alive(folder)  # asked first: what it wrote before its end is told
            for record in records.take(Intervention.from_dict):
                say(tell_again(record) if record.kind in seen else tell(record))
                seen.add(record.kind)
            for piece in advice.take(Advice.from_dict):
                say(describe_advice(piece))
            if not alive:
                break
            time.sleep(max(chosen.seconds, 0.01))
    except KeyboardInterrupt:
        return 0
    if runs[-1].ended is None:
        say(headline(read_run_data(folder)))
    return 0


@final
class NewLines:
    """Reads what is added to a file of records.

    Args:
        path: The file, which need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self._file: int | None = None

    def take(self, parse: Callable[[Mapping[str, Any]], _Record]) -> list[_Record]:
        """The records that are new since the last call; one that is not whole yet is left for the next."""
        older, path = put_aside(self._path), self._path
        try:
            lines = b""
            file = path.stat().st_ino
            if file != self._file and older.is_file():
                lines = read_whole(older, self._read) + b"\n"  # it was put aside, and a new one has begun
                self._read = 0
            self._file = file
            whole = read_whole(path, self._read).rpartition(b"\n")[0]
        except OSError:
            return []
        self._read += len(whole) + bool(whole)
        return readable(lines + whole, parse)  # `nanguard explain` says which lines cannot be read
