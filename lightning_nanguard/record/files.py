"""Reads and appends to the files of a run."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

from lightning_nanguard.record.text import listed_numbers
from lightning_nanguard.types import SCHEMA_VERSION, Intervention

_logger = logging.getLogger("lightning_nanguard")

RECORDS_FILE, ADVICE_FILE = "interventions.jsonl", "advice.jsonl"
"""Names of the files in a run's folder of records."""

LAST_GOOD = "nanguard-last-good.ckpt"
"""Name of the checkpoint file that the guard itself writes."""

_Parsed = TypeVar("_Parsed")

# A torn or overwritten line may have wrong bytes, another type, or too many nested brackets.
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


def read_whole(path: str | os.PathLike[str], begin: int = 0) -> bytes:
    """Read all bytes of a file.

    Args:
        path: The file.
        begin: Number of bytes to leave out at the beginning.

    Raises:
        OSError: If there is no such file, or it is a folder, a pipe or a device, which might never end.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"{os.fspath(path)} is not a file.")
    with open(path, "rb") as file:
        file.seek(begin)
        return file.read()


def readable(lines: bytes, parse: Callable[[Any], _Parsed]) -> list[_Parsed]:
    """What ``parse`` makes of the JSON value of each line. Lines that cannot be read are left out."""
    found = []
    for line in lines.splitlines():
        with contextlib.suppress(*_UNREADABLE):
            found.append(parse(json.loads(line)))
    return found


def float_or_none(value: float | str | None) -> float | None:
    """A number of a record, in which numbers that are not finite are words; ``None`` stays."""
    return None if value is None else float(value)


def append(file: FileIO, lines: bytes, *, lasting: bool = False) -> None:
    """Add lines to a file. If this fails, the file does not change.

    Args:
        file: The file, opened with mode ``"a+b"``. It has no buffer, because ``close()`` would write a buffer again
            that was left over from a full disk.
        lines: The lines, the last one with its end.
        lasting: Whether to wait until they are on the disk.
    """
    size = os.fstat(file.fileno()).st_size
    if size:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":  # a killed run has left a torn line, which would make the next one unreadable
            lines = b"\n" + lines
    rest = memoryview(lines)
    try:
        while rest:
            rest = rest[file.write(rest) :]
        if lasting:
            sync(file)
    except BaseException:
        # Remove partial lines, because the next try writes them again.
        with contextlib.suppress(OSError):
            file.truncate(size)
        raise


def how_to_write(folder: Path) -> str:
    """What the user can do if no file can be written in a folder.

    Args:
        folder: The folder, which need not exist.
    """
    nearest = next((one for one in (folder, *folder.parents) if one.exists()), folder)
    if nearest.is_file():
        return f"{nearest} is a file: choose a folder for the next run."
    return "Free space on the disk, make the folder writable, or choose another folder for the next run."


def sync(file: FileIO) -> None:
    """Wait until a file is on the disk, if it is one on a disk."""
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        os.fsync(file.fileno())


def put_aside(path: str | os.PathLike[str]) -> Path:
    """The new path of a file of records that has grown too large for :class:`JsonLines`.

    Example:
        >>> put_aside("interventions.jsonl").name
        'interventions.1.jsonl'
    """
    path = Path(path)
    return path.with_name(f"{path.stem}.1{path.suffix}")


def with_put_aside(path: str | os.PathLike[str]) -> list[Path]:
    """The existing files with the records of a path, the oldest first."""
    older = put_aside(path)
    return [older, Path(path)] if older.is_file() else [Path(path)]


def read_records(path: str | os.PathLike[str]) -> list[Intervention]:
    """Read the records of a file that :class:`JsonLines` wrote, oldest first.

    Lines that are not records, such as one torn by a killed run, are left out with one logged warning. In records of
    later versions, unknown fields are ignored.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file. A run in which nothing happened writes none.
    """
    return read_file(path, Intervention.from_dict)


def read_file(path: str | os.PathLike[str], parse: Callable[[Mapping[str, Any]], _Parsed]) -> list[_Parsed]:
    """Read the records of any kind in a file of a run, oldest first; see :func:`read_records`.

    Args:
        path: The file.
        parse: Makes a record of the JSON object in a line.

    Raises:
        FileNotFoundError: If there is no such file. A run without such a record writes none.
    """
    return [record for one in with_put_aside(path) for record in _read_file(one, parse)]


def _read_file(path: Path, parse: Callable[[Mapping[str, Any]], _Parsed]) -> list[_Parsed]:
    records: list[_Parsed] = []
    unreadable: list[int] = []
    later = False
    for number, line in enumerate(read_whole(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            later = later or (isinstance(data, dict) and _is_later(data.get("schema")))
            records.append(parse(data))
        except _UNREADABLE:
            unreadable.append(number)
    if unreadable:
        _logger.warning(
            "NaNGuard: %s: ignored %s without a readable record; %s.",
            os.fspath(path),
            listed_numbers("line", unreadable),
            "the file holds records of a later version: update lightning-nanguard to read them"
            if later
            else "a run that was killed while writing leaves such a line, and the other records are complete"
            if records
            else "no line of it is a record, so the file is damaged, or is none of a run",
        )
    return records


def _is_later(schema: object) -> bool:
    return isinstance(schema, int) and schema > SCHEMA_VERSION
