"""Prints what comes from records and files, and never a character that controls the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from lightning_nanguard.record.run_log import RUN_FILE
from lightning_nanguard.record.text import printable


def say(text: str, file: TextIO | None = None) -> None:
    """Print lines of text; what the terminal's encoding lacks is shown as an escape.

    Args:
        text: The lines; the indentation of a line is kept.
        file: Where to; ``None`` for standard output.
    """
    for line in text.split("\n") if text else [""]:
        indent = " " * (len(line) - len(line.lstrip(" ")))
        _print(indent + printable(line), sys.stdout if file is None else file)


def say_table(lines: Sequence[Sequence[str]]) -> None:
    """Print lines of cells in columns, on standard output."""
    shown = [[printable(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for line in shown:
        _print("  ".join(map(str.ljust, line, widths)).rstrip(), sys.stdout)


def _print(line: str, stream: TextIO) -> None:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream)


def say_no_run(where: Path) -> int:
    """Say that a folder holds no run, or one whose log cannot be read; gives the exit status."""
    log = next(iter(sorted(where.rglob(RUN_FILE))), None)
    none = f"there is no run of NaNGuard in {where} or below it"
    say(f"nanguard: {none if log is None else f'{log} is damaged: it does not say which run it is'}", file=sys.stderr)
    return 2


def write_page(output: Path, text: str, name: str) -> None:
    """Write a page in one move, and say where it lies.

    Args:
        output: The file, or a folder that exists.
        text: The page.
        name: Name of the file in such a folder.
    """
    if output.is_dir():
        output /= name
    output.parent.mkdir(parents=True, exist_ok=True)
    new = output.with_name(f"{output.name}.new")
    try:
        new.write_text(text, encoding="utf-8")
        os.replace(new, output)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    say(str(output))
