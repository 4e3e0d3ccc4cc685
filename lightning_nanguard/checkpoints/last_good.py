"""Writes the last good checkpoint to disk, together with a snapshot. It is final once that snapshot is certified."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import final

from lightning_nanguard.record.files import LAST_GOOD, how_to_write
from lightning_nanguard.state.ring import Ring

_logger = logging.getLogger("lightning_nanguard")


@final
class LastGood:
    """Keeps one checkpoint file of a certified state on disk.

    A file is written under a temporary name, at the end of a batch in which a snapshot was taken. So file and snapshot
    hold the state of the same update. When the snapshot is certified, the file replaces the older one. When the
    snapshot is dropped, the file is deleted. A write error is logged once, and the guard tries again later.

    A file that a killed run has written in part is removed at the start.

    Args:
        folder: Folder of the file.
        every: Number of updates between files.
        ring: Stores the snapshots.
        write: Writes a whole checkpoint to a path, and is called on every rank. It may return before the file is whole.
        leads: Whether this rank moves and removes files.
        step: Number of updates before this fit.

    Attributes:
        path: The certified file.
        pending: The file whose snapshot is not certified yet.
    """

    def __init__(
        self, folder: Path, every: int, ring: Ring, write: Callable[[Path], None], *, leads: bool, step: int
    ) -> None:
        self.path = folder / LAST_GOOD
        self.pending = self.path.with_name(f"{LAST_GOOD}.pending")
        self._every = every
        self._ring = ring
        self._write = write
        self._leads = leads
        # The update of the snapshot that belongs to the pending file. It is the same on every rank.
        self._pending_step: int | None = None
        # On the rank that leads: whether a certified file is not whole yet, and whether writing it has failed.
        self._waiting = self._failed = False
        self._seen = self._last = step
        self._warned = False
        self._remove(self.pending)

    def due(self, step: int) -> bool:
        """Whether a snapshot should be taken after update ``step``, because a file is due with it."""
        return self._pending_step is None and step - self._last >= self._every

    def close_batch(self, step: int) -> None:
        """After all callbacks have seen the end of a batch: write a file if one is due after ``step`` updates."""
        updated, self._seen = step > self._seen, step
        self._settle()
        taken = self._ring.pending is not None and self._ring.pending.step == step
        if not (updated and taken and self.due(step)):
            return
        self._pending_step = self._last = step
        self._waiting = self._failed = False
        try:
            # Nothing before this line may fail on one rank alone, because the other ranks wait for it in this call.
            self._write(self.pending)
        except Exception as error:  # a write error must not end a run
            self.failed(error)

    def failed(self, error: Exception) -> None:
        """Handle a write error: remove the pending file, keep the older one, and warn the first time."""
        if not self._warned and self._leads:
            self._warned = True
            _logger.warning(
                "NaNGuard: cannot write %s: %s: %s. Training goes on, and an older file stays as it is. The guard "
                "tries again every %d updates. %s",
                self.path,
                type(error).__name__,
                error,
                self._every,
                how_to_write(self.path.parent),
            )
        self._failed, self._waiting = True, False
        self._remove(self.pending)

    def message(self) -> str:
        """A line that says where the certified file lies; ``""`` if there is none."""
        return f"checkpoint: the last good one is {self.path}" if self.path.exists() else ""

    def end(self) -> None:
        """End the fit: a certified file replaces the older one, and a file that is not certified is removed."""
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
    # A plugin may still be writing it in the background. The zip directory at the end of a file is written last.
    return path.is_dir() or zipfile.is_zipfile(path)


def _replace(new: Path, old: Path) -> None:
    """Replace ``old`` by ``new``. After a power failure one of the two is whole."""
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
