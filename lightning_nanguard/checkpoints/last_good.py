"""The last good checkpoint on disk: written with a snapshot, in its place once that snapshot is certified."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import final

from lightning_nanguard.checkpoints.inspection import LAST_GOOD
from lightning_nanguard.state.ring import Ring

_logger = logging.getLogger("lightning_nanguard")


@final
class LastGood:
    """Keeps one certified checkpoint file, and the older one until a newer is certified.

    A file is written at the end of a batch in which a snapshot was taken, so that both hold the same state, clock
    included, under another name than the final one. When the snapshot is certified the file takes the place of the
    older; when the snapshot is dropped, so is the file. What cannot be written is said once and tried again later.

    Args:
        folder: Where the file lies.
        every: Updates between files.
        ring: The snapshots.
        write: Writes a whole checkpoint of now to a path, on every rank; it may go on after it returns.
        leads: Whether this process moves and removes files.
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
        # The same on every rank: the update of the snapshot whose file waits for a verdict.
        self._twin: int | None = None
        # On the one that leads: whether a certified file waits to be whole, and whether the newest could be written.
        self._waiting = self._lost = False
        self._seen = self._last = 0
        self._complained = False

    def begin(self, step: int) -> None:
        """A fit begins at update ``step``: what a killed run left half written goes."""
        self._seen = self._last = step
        self._remove(self.pending)

    def due(self, step: int) -> bool:
        """Whether a snapshot should be taken after update ``step``, for a file to be written with it."""
        return self._twin is None and step - self._last >= self._every

    def close_batch(self, step: int) -> None:
        """A batch is over for every callback, ``step`` updates having been made."""
        updated, self._seen = step > self._seen, step
        self._settle()
        taken = self._ring.pending is not None and self._ring.pending.step == step
        if not (updated and taken and self.due(step)):
            return
        self._twin = self._last = step
        self._waiting = self._lost = False
        try:
            # Nothing that could fail on one rank alone comes before: the others would wait for it in there.
            self._write(self.pending)
        except Exception as error:  # whatever keeps it from being written is no reason to lose a run
            self.failed(error)

    def failed(self, error: Exception) -> None:
        """A file could not be written; the older one stays."""
        if not self._complained and self._leads:
            self._complained = True
            _logger.warning(
                "NaNGuard: cannot write %s: %s: %s. Training goes on, an older file stays as it is, and it is tried "
                "again every %d updates. Free space there or make the folder writable.",
                self.path,
                type(error).__name__,
                error,
                self._every,
            )
        self._lost, self._waiting = True, False
        self._remove(self.pending)

    def told(self) -> str:
        """Where the file is, in a sentence; ``""`` where there is none."""
        return f"A certified checkpoint lies in {self.path}. " if self.path.exists() else ""

    def end(self) -> None:
        """The fit is over: a certified file takes its place, another is dropped."""
        self._settle()
        self._twin = None
        self._remove(self.pending)

    def _settle(self) -> None:
        if self._twin is not None:
            pending = self._ring.pending
            if any(snapshot.step == self._twin for snapshot in self._ring.certified):
                self._twin, self._waiting = None, self._leads and not self._lost
            elif pending is None or pending.step != self._twin:
                self._twin = None
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
    # A plugin may still be writing it in the background; the zip's directory, at its end, comes last.
    return path.is_dir() or zipfile.is_zipfile(path)


def _replace(new: Path, old: Path) -> None:
    """Put ``new`` in the place of ``old``, so that a power failure leaves one of the two."""
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
