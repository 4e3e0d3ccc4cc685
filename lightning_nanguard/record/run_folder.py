"""The folder of one run, which no other run writes to."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from lightning_nanguard.record.files import ADVICE_FILE, LAST_GOOD, RECORDS_FILE
from lightning_nanguard.record.run_log import append_event, new_run_id, read_run, relative_path, seen_from

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".nanguard.lock"
"""Name of the file that a live run has locked in its folder."""

_HELD: set[str] = set()
"""Real paths of the folders that this process has locked. The system forgets a lock once any handle is closed."""


@final
class RunFolder:
    """The folder of a run that is alive.

    Args:
        path: The folder.
        run_id: The run's id.
        lock: Handle of the locked file; ``None`` if the folder cannot be written. Then there is no log.

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
        """Whether files are written even for a healthy run."""
        return self._lock is not None

    def log(self, event: str, **values: Any) -> None:
        """Write an event to the log of the run. If the log cannot be written, the run goes on."""
        if self.keeps_files:
            with contextlib.suppress(OSError):
                append_event(self.path, event, {"run": self.run_id, **values})

    def saved(self, path: str, step: int) -> None:
        """Log the first time that the run saves a checkpoint at a path."""
        if path not in self._saved:
            self._saved.add(path)
            if (relative := relative_path(path, self.path)) is not None:
                self.log("save", path=relative, step=step)

    def close(self) -> None:
        """The run is over for this process."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.path / LOCK_FILE)
            os.close(self._lock)
            self._lock = None
            _HELD.discard(os.path.realpath(self.path))


def open_run_folder(base: Path, run_id: str | None, *, shared: bool, begin: Mapping[str, Any]) -> RunFolder:
    """Choose a folder for a run. No other run writes to it, and a resumed run uses the same one.

    Args:
        base: The folder itself, if the logger or the user gives each run its own. If it belongs to another run, the run
            uses a folder below it, named by its id.
        run_id: Id of the run that is resumed; ``None`` for a new one. If that run is still alive in another process,
            this one gets a new id.
        shared: Whether several runs share ``base``, so that each uses a folder below it.
        begin: The entry of this fit in the log; under ``"checkpoint"`` the absolute path of the resumed checkpoint.
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
            # The folder cannot be written now, but perhaps later.
            return RunFolder(place, name)
        folder = RunFolder(place, name, lock)
        if _owner(place) in (None, name):
            folder.log("fit", **seen_from(place, begin))
            return folder
        folder.close()  # another run was faster
    return RunFolder(own, name)


def is_alive(folder: Path) -> bool:
    """Whether the run of a folder is alive in any process. Without locks: whether its log has no end."""
    run = read_run(folder)
    if run is None or run.ended is not None:
        return False
    if os.path.realpath(folder) in _HELD:
        return True
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
    """Id of the run that a folder belongs to, ``""`` if the run has none, ``None`` if the folder is free."""
    run = read_run(folder)
    if run is None:  # version 0.1.0 kept no log
        return "" if any((folder / name).exists() for name in (RECORDS_FILE, ADVICE_FILE, LAST_GOOD)) else None
    # If a run was killed before it wrote a last good checkpoint, a new run may use its folder. So a program that is
    # restarted with the same folder keeps its path. Nothing is overwritten, and each record has the id of its run.
    return None if run.ended is None and not (folder / LAST_GOOD).exists() else run.run_id


def _lock(folder: Path) -> int:
    """Lock a folder until this process ends. Forked children do not hold the lock.

    Raises:
        BlockingIOError: If another process has locked it.
        OSError: If the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    if fcntl is not None:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Other errors: some network file systems have no locks.
            if error.errno in (errno.EAGAIN, errno.EACCES):
                os.close(handle)
                raise BlockingIOError(str(error)) from error
    _HELD.add(os.path.realpath(folder))
    return handle
