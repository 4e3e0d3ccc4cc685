"""The last good checkpoint on disk: written together with a snapshot, final once that snapshot is certified."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import final

from lightning_nanguard.record.files import LAST_GOOD
from lightning_nanguard.state.ring import Ring

_logger = logging.getLogger("lightning_nanguard")


@final
class LastGood:
    """Keeps one checkpoint file of a certified state on disk.

    A file is written under a temporary name at the end of a batch in which a snapshot was taken, so that both hold the
    state of the same update. When the snapshot is certified, the file replaces the older one. When the snapshot is
    dropped, the file is deleted. An error in writing is logged once, and the guard tries again later.

    Args:
        folder: Folder of the file.
        every: Number of updates between files.
        ring: The snapshots.
        write: Writes a whole checkpoint of now to a path, on every rank; it may return before the file is whole.
        leads: Whether this process moves and removes files.

    Attributes:
        path: The certified file.
        pending: The file whose snapshot is not certified yet.
    """

    def __init__(
        self, folder: Path, every: int, ring: Ring, write: Callable[[Path], None], *, leads: bool = True
    ) -> None:
        self.path = folder / LAST_GOOD
        self.pending = self.path.with_name(f"{LAST_GOOD}.pending")
        self._every = every
        self._ring = ring
        self._write = write
        self._leads = leads
        # The update of the snapshot that the pending file was written with; the same on every rank.
        self._pending_step: int | None = None
        # On the process that leads: whether a certified file is not whole yet, and whether writing it has failed.
        self._waiting = self._failed = False
        self._seen = self._last = 0
        self._warned = False

    def begin(self, step: int) -> None:
        """A fit begins at update ``step``: remove what a killed run has left half written."""
        self._seen = self._last = step
        self._remove(self.pending)

    def due(self, step: int) -> bool:
        """Whether a snapshot should be taken after update ``step``, for a file to be written with it."""
        return self._pending_step is None and step - self._last >= self._every

    def close_batch(self, step: int) -> None:
        """A batch is over for every callback, after ``step`` updates: write a file where one is due."""
        updated, self._seen = step > self._seen, step
        self._settle()
        taken = self._ring.pending is not None and self._ring.pending.step == step
        if not (updated and taken and self.due(step)):
            return
        self._pending_step = self._last = step
        self._waiting = self._failed = False
        try:
            # Nothing before this may fail on one rank alone: the others would wait for it in here.
            self._write(self.pending)
        except Exception as error:  # no error in writing may end a run
            self.failed(error)

    def failed(self, error: Exception) -> None:
        """The pending file could not be written: remove it, keep the older one, and warn the first time."""
        if not self._warned and self._leads:
            self._warned = True
            _logger.warning(
                "NaNGuard: cannot write %s: %s: %s. Training goes on, and an older file stays as it is. The guard "
                "tries again every %d updates. Free space on the disk, or make the folder writable.",
                self.path,
                type(error).__name__,
                error,
                self._every,
            )
        self._failed, self._waiting = True, False
        self._remove(self.pending)

    def message(self) -> str:
        """A sentence that says where the certified file lies; ``""`` if there is none."""
        return f"The last good checkpoint is {self.path}. " if self.path.exists() else ""

    def end(self) -> None:
        """The fit is over: a certified file replaces the older one, a file that is not certified is dropped."""
        self._settle()
        self._pending_step = None
        self._remove(self.pending)

    def _settle(self) -> None:
        if self._pending_step is not None:
            pending = self._ring.pending
            if any(snapshot.step == self._pending_step for snapshot in self._ring.certified):
                self._pending_step, self._waiting = None, self._leads and not self._failed
            elif pending is None or pending.step != self._pending_step:
                self._pending_step = None
                self._remove(self.pending)
        if self._waiting and _whole(self.pending):
            self._waiting = False
            try:
                _replace(self.pending, self.path)
            except OSError as error:
                self.failed(error)

    def _remove(self, path: Path) -> None:
        if self._leads:
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _whole(path: Path) -> bool:
    # A plugin may still be writing it in the background; the zip directory at its end comes last.
    return path.is_dir() or zipfile.is_zipfile(path)


def _replace(new: Path, old: Path) -> None:
    """Replace ``old`` by ``new`` so that a power failure leaves one of the two whole."""
    if new.is_dir():
        aside = old.with_name(f"{old.name}.older")
        if old.exists():
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(old, aside)
        os.replace(new, old)
        shutil.rmtree(aside, ignore_errors=True)
        return
    _sync(new)
    os.replace(new, old)
    _sync(old.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
