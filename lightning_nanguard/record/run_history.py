"""Finds the earlier folders of a run that was resumed into another one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_nanguard.record.files import RECORDS_FILE, read_records
from lightning_nanguard.record.run_log import RunLog, read_run

CHECKPOINT = "checkpoint"
"""What the log of a run calls the checkpoint that a fit was resumed from, seen from the folder of the run."""


def seen_from(folder: Path, begin: Mapping[str, Any]) -> dict[str, Any]:
    """The log entry of a fit, with a relative path of its checkpoint, so that folder and checkpoint can be moved.

    Args:
        folder: The folder of the run.
        begin: The entry, with an absolute path.
    """
    said = {name: value for name, value in begin.items() if name != CHECKPOINT}
    path = None if begin.get(CHECKPOINT) is None else relative_path(begin[CHECKPOINT], folder)
    return said if path is None else {**said, CHECKPOINT: path}


def relative_path(path: str, folder: Path) -> str | None:
    """A path seen from a folder, so that both can be moved together; ``None`` on another drive."""
    try:
        return os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
    except ValueError:
        return None


def earlier_parts(log: RunLog) -> list[RunLog]:
    """The logs of the same run in its earlier folders, oldest first.

    Most loggers give a restarted program a new folder, even if it resumes from a checkpoint.

    Args:
        log: The log in the present folder of the run.
    """
    found: list[RunLog] = []
    seen = {os.path.realpath(log.folder)}
    while (before := _part_before(log)) is not None and os.path.realpath(before.folder) not in seen:
        seen.add(os.path.realpath(before.folder))
        found.insert(0, before)
        log = before
    return found


def with_earlier_parts(logs: Iterable[RunLog]) -> list[RunLog]:
    """The logs of some runs, each after those of its earlier folders.

    Args:
        logs: The logs in the present folders of the runs.
    """
    return [part for log in logs for part in (*earlier_parts(log), log)]


def interventions_of_resumed(folder: Path) -> int | None:
    """Number of recorded interventions of a resumed run since its beginning; ``None`` if it was not resumed.

    Args:
        folder: The folder of the run.
    """
    log = read_run(folder)
    earlier = [] if log is None else earlier_parts(log)
    if log is None or (len(log.fits) < 2 and not earlier):
        return None
    files = [part.folder / RECORDS_FILE for part in (*earlier, log)]
    return sum(len(read_records(file)) for file in files if file.is_file())


def _part_before(log: RunLog) -> RunLog | None:
    path = log.fits[0].get(CHECKPOINT) if log.fits else None
    if not isinstance(path, str):
        return None
    place = Path(os.path.normpath(log.folder / path)).parent
    for base in (place, place / "nanguard", place.parent / "nanguard"):
        for folder in (base, base / log.run_id):
            other = read_run(folder)
            if other is not None and other.run_id == log.run_id:
                return other
    return None
