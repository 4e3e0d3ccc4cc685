"""Prints what comes from records and files, and never a character that controls the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TextIO

from lightning_nanguard.record.text import printable


def say(text: str, file: TextIO | None = None) -> None:
    """Print lines of text; what the terminal's encoding lacks is shown as an escape.

    Args:
        text: The lines; the indentation of a line is kept.
        file: Where to; ``None`` for standard output.
    """
    stream = sys.stdout if file is None else file
    encoding = getattr(stream, "encoding", None) or "utf-8"
    for line in text.split("\n") if text else [""]:
        indent = " " * (len(line) - len(line.lstrip(" ")))
        print((indent + printable(line)).encode(encoding, "backslashreplace").decode(encoding), file=stream)


def say_no_run(where: Path) -> int:
    """Say that a folder holds no run; gives the exit status."""
    say(f"nanguard: no run of NaNGuard lies in {where} or below it", file=sys.stderr)
    return 2
