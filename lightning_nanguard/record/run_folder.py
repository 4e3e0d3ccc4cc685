"""The folder of one run, which no other run writes to."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from lightning_nanguard.record.files import ADVICE_FILE, LAST_GOOD, RECORDS_FILE
from lightning_nanguard.record.run_history import seen_from
from lightning_nanguard.record.run_log import append_event, new_run_id, read_run

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".nanguard.lock"
"""Name of the file that a live run has locked in its folder."""


@final
class RunFolder:
    """The folder of a run while it is alive.

    Args:
        path: The folder.
        run_id: The run's id.
        lock: Handle of the locked file; ``None`` where nothing can be written, and no log is kept.

    Attributes:
        path: The folder.
        run_id: The run's id.
    """

    def __init__(self, path: Path, run_id: str, lock: int | None = None) -> None:
        self.path = path
        self.run_id = run_id
        self._lock = lock
        self._saved: set[str] = set()

    @property
    def keeps_files(self) -> bool:
        """Whether files of a healthy run are kept here, too."""
        return self._lock is not None

    def log(self, event: str, **values: Any) -> None:
        """Put an event in the log of the run; a log that cannot be written costs the run nothing."""
        if self.keeps_files:
            with contextlib.suppress(OSError):
                append_event(self.path, event, {"run": self.run_id, **values})

    def saved(self, path: str, step: int) -> None:
        """Put in the log, the first time, that the run saves a checkpoint there."""
        if path not in self._saved:
            self._saved.add(path)
            with contextlib.suppress(ValueError):  # another drive
                # Seen from the folder, so that both can be moved together.
                self.log("save", path=os.path.relpath(os.path.realpath(path), os.path.realpath(self.path)), step=step)

    def close(self) -> None:
        """The run is over for this process."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.path / LOCK_FILE)
            os.close(self._lock)
            self._lock = None


def open_run_folder(base: Path, run_id: str | None, *, shared: bool, begin: Mapping[str, Any]) -> RunFolder:
    """Take a folder for a run. No other run writes to it, and a resumed run finds its own again.

    Args:
        base: The folder itself, where the logger or the user gives each run one. Where it belongs to another run, the
            run takes a folder below it, named by its id.
        run_id: Id of the run that is resumed; ``None`` for a new one. Where that run is still alive in another process,
            two went on from one checkpoint, and this one takes a new id.
        shared: Whether several runs have ``base`` in common, so that each takes a folder below it.
        begin: What the log says of this fit; under ``"checkpoint"`` the absolute path of the one it is resumed from.
    """
    name = new_run_id() if run_id is None else run_id
    own = base / name
    places = [own] if shared else [own, base] if own.is_dir() else [base, own]
    for place in places:
        if _owner(place) not in (None, name):
            continue
        try:
            lock = _lock(place)
        except BlockingIOError:
            if run_id is not None:
                return open_run_folder(base, None, shared=shared, begin={**begin, "branch_of": run_id})
            continue
        except OSError:
            # Nothing can be written there now, maybe later.
            return RunFolder(place, name)
        folder = RunFolder(place, name, lock)
        if _owner(place) in (None, name):
            folder.log("fit", **seen_from(place, begin))
            return folder
        folder.close()  # another run was faster
    return RunFolder(own, name)


def is_alive(folder: Path) -> bool:
    """Whether the run of a folder goes on in another process; where folders cannot be locked, whether it has not ended.

    Args:
        folder: The folder of the run.
    """
    run = read_run(folder)
    if run is None or run.ended is not None:
        return False
    if fcntl is None:
        return True
    try:
        handle = os.open(folder / LOCK_FILE, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _owner(folder: Path) -> str | None:
    """Id of the run that a folder belongs to, ``""`` where the run has none, ``None`` where the folder is free."""
    run = read_run(folder)
    if run is None:  # version 0.1.0 kept no log
        return "" if any((folder / name).exists() for name in (RECORDS_FILE, ADVICE_FILE, LAST_GOOD)) else None
    # A run that was killed before it left a last good checkpoint is begun anew in its place: a program that is started
    # again and again with one folder finds its file there. Nothing is overwritten, and each record has its run's id.
    return None if run.ended is None and not (folder / LAST_GOOD).exists() else run.run_id


def _lock(folder: Path) -> int:
    """Lock a folder for as long as this process lives; children that it forks do not hold the lock.

    Raises:
        BlockingIOError: When another process has locked it.
        OSError: When nothing can be written there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    if fcntl is not None:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems have no locks.
            if error.errno in (errno.EAGAIN, errno.EACCES):
                os.close(handle)
                raise BlockingIOError(str(error)) from error
    return handle
