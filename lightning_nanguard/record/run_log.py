"""The log of a run: when its fits began and ended, and which checkpoints it saved. One JSON object a line."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from lightning_nanguard.record.files import RECORDS_FILE, append, read_records, read_whole, readable
from lightning_nanguard.types import SCHEMA_VERSION, plain

RUN_FILE = "run.jsonl"
"""Name of the file in a run's folder that says which run it is."""

CHECKPOINT = "checkpoint"
"""What the log of a run calls the checkpoint that a fit was resumed from, seen from the folder of the run."""


def new_run_id() -> str:
    """An id for a run, such as ``"20261201-142530-5f3a9c"``: unique, and in the order of time.

    It draws nothing from the random streams of the run.
    """
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


@final
@dataclass(frozen=True, slots=True)
class RunLog:
    """The content of the log of a run.

    Attributes:
        folder: The folder of the run.
        run_id: The run's id.
        fits: One entry for each time the run was begun or resumed, oldest first: ``time``, ``step``, ``version``, ….
        ended: How the newest fit ended: ``time``, ``updates``, ``interventions``, …; ``None`` if it goes on, or was
            killed.
        saved: For each checkpoint, by its path relative to the folder: when it was saved, and by which run.
    """

    folder: Path
    run_id: str
    fits: tuple[Mapping[str, Any], ...] = ()
    ended: Mapping[str, Any] | None = None
    saved: Mapping[str, tuple[float, str]] = field(default_factory=dict)

    @property
    def begun(self) -> float:
        """When the newest fit began, in seconds since 1970; 0 if it is not known."""
        when = self.fits[-1].get("time") if self.fits else None
        return float(when) if isinstance(when, (int, float)) else 0.0

    def saved_by(self, path: Path) -> tuple[float, str] | None:
        """When a checkpoint was saved at a path, in seconds since 1970, and by which run; ``None`` if none was."""
        real = os.path.realpath(path)
        return next((save for name, save in self.saved.items() if os.path.realpath(self.folder / name) == real), None)

    def fits_of_files(self) -> dict[str, float]:
        """For each checkpoint that the run saved, by its real path: when the fit began that saved it last."""
        begins = [when for fit in self.fits if isinstance(when := fit.get("time"), (int, float))]
        return {
            os.path.realpath(self.folder / name): max((begin for begin in begins if begin <= when), default=0.0)
            for name, (when, run) in self.saved.items()
            if run == self.run_id
        }


def append_event(folder: Path, event: str, values: Mapping[str, Any]) -> None:
    """Append one event to the log of the run in a folder.

    Args:
        folder: The folder; it exists.
        event: ``"fit"``, ``"save"`` or ``"end"``.
        values: The values of the event.

    Raises:
        OSError: If it cannot be written.
    """
    entry = {"schema": SCHEMA_VERSION, "event": event, "time": round(time.time(), 3), **plain(values)}
    line = json.dumps(entry, allow_nan=False, default=str).encode() + b"\n"
    with open(folder / RUN_FILE, "a+b", buffering=0) as file:
        append(file, line)


def read_run(folder: Path) -> RunLog | None:
    """Read the log in a folder; ``None`` if there is no readable one."""
    try:
        lines = read_whole(folder / RUN_FILE)
    except OSError:
        return None
    run_id = ""
    fits: list[Mapping[str, Any]] = []
    ended: Mapping[str, Any] | None = None
    saved: dict[str, tuple[float, str]] = {}
    for entry in readable(lines, dict):
        match entry:
            case {"event": "fit", "run": str(name)}:
                if name != run_id:  # a new run in the folder of a killed one
                    run_id, fits = name, []
                fits.append(entry)
                ended = None
            case {"event": "save", "path": str(path), "time": int() | float() as when, "run": str(name)}:
                saved[path] = float(when), name
            case {"event": "end"}:
                ended = entry
    return RunLog(folder, run_id, tuple(fits), ended, saved) if run_id else None


def find_runs(where: Path) -> list[RunLog]:
    """The runs in a folder and below it, ordered by the time of their last begin or resume."""
    found = [run for path in where.rglob(RUN_FILE) if (run := read_run(path.parent)) is not None]
    return sorted(found, key=lambda run: (run.begun, run.run_id, str(run.folder)))


def seen_from(folder: Path, begin: Mapping[str, Any]) -> dict[str, Any]:
    """The log entry of a fit, with a relative path of its checkpoint, so that folder and checkpoint can be moved."""
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
    """
    found: list[RunLog] = []
    seen = {os.path.realpath(log.folder)}
    while (before := _part_before(log)) is not None and os.path.realpath(before.folder) not in seen:
        seen.add(os.path.realpath(before.folder))
        found.insert(0, before)
        log = before
    return found


def with_earlier_parts(logs: Iterable[RunLog]) -> list[RunLog]:
    """The logs of some runs, each after those of its earlier folders."""
    return [part for log in logs for part in (*earlier_parts(log), log)]


def interventions_of_resumed(folder: Path) -> int | None:
    """Number of recorded interventions of a resumed run since its beginning; ``None`` if it was not resumed."""
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
