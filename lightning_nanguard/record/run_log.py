"""The log of a run: when its fits began and ended, and which checkpoints it saved. One JSON object a line."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from lightning_nanguard.record.files import read_whole
from lightning_nanguard.types import SCHEMA_VERSION, plain

RUN_FILE = "run.jsonl"
"""Name of the file in a run's folder that says which run it is."""


def new_run_id() -> str:
    """An id for a run, such as ``"20261201-142530-5f3a9c"``: unique, and in the order of time.

    It draws nothing from the random streams of the run.
    """
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


@final
@dataclass(frozen=True, slots=True)
class RunLog:
    """What the log of a run says.

    Attributes:
        folder: The folder of the run.
        run_id: The run's id.
        fits: One entry for each time the run was begun or resumed, oldest first: ``time``, ``step``, ``version``, ….
        ended: How the newest fit ended: ``time``, ``updates``, ``interventions``, …; ``None`` where it goes on, or was
            killed.
        saved: When checkpoints were saved and by which run, by their paths seen from the folder.
    """

    folder: Path
    run_id: str
    fits: tuple[Mapping[str, Any], ...] = ()
    ended: Mapping[str, Any] | None = None
    saved: Mapping[str, tuple[float, str]] = field(default_factory=dict)

    @property
    def begun(self) -> float:
        """When the newest fit was begun, in seconds since 1970; 0 where that is not known."""
        when = self.fits[-1].get("time") if self.fits else None
        return float(when) if isinstance(when, (int, float)) else 0.0

    def saved_by(self, path: Path) -> tuple[float, str] | None:
        """When a checkpoint was saved at a path, in seconds since 1970, and by which run; ``None`` where none was."""
        return next((save for name, save in self.saved.items() if _same(self.folder / name, path)), None)


def append_event(folder: Path, event: str, values: Mapping[str, Any]) -> None:
    """Append one event to the log of the run in a folder.

    Args:
        folder: The folder; it exists.
        event: ``"fit"``, ``"save"`` or ``"end"``.
        values: What is to be known of it.

    Raises:
        OSError: When it cannot be written.
    """
    entry = {"schema": SCHEMA_VERSION, "event": event, "time": round(time.time(), 3), **plain(values)}
    line = json.dumps(entry, allow_nan=False, default=str).encode() + b"\n"
    handle = os.open(folder / RUN_FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(handle).st_size
        # A line that a killed run left without its end would make this one unreadable.
        torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n" if hasattr(os, "pread") else False
        os.write(handle, b"\n" + line if torn else line)
    finally:
        os.close(handle)


def read_run(folder: Path) -> RunLog | None:
    """What the log in a folder says; ``None`` where there is none that can be read.

    Args:
        folder: The folder of a run.
    """
    try:
        lines = read_whole(folder / RUN_FILE).splitlines()
    except OSError:
        return None
    run_id = ""
    fits: list[Mapping[str, Any]] = []
    ended: Mapping[str, Any] | None = None
    saved: dict[str, tuple[float, str]] = {}
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            entry = json.loads(line)
            match entry:
                case {"event": "fit", "run": str(name)}:
                    if name != run_id:  # begun anew in the place of one that was killed
                        run_id, fits = name, []
                    fits.append(entry)
                    ended = None
                case {"event": "save", "path": str(path), "time": int() | float() as when, "run": str(name)}:
                    saved[path] = float(when), name
                case {"event": "end"}:
                    ended = entry
    return RunLog(folder, run_id, tuple(fits), ended, saved) if run_id else None


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def find_runs(where: Path) -> list[RunLog]:
    """The runs in a folder and all below it, the one begun or resumed last at the end.

    Args:
        where: Where to look.
    """
    found = [run for path in where.rglob(RUN_FILE) if (run := read_run(path.parent)) is not None]
    return sorted(found, key=lambda run: (run.begun, run.run_id, str(run.folder)))
