"""A sink that appends records to a file, one JSON object a line."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections import deque
from pathlib import Path
from typing import Any, final

from lightning_nanguard.errors import require
from lightning_nanguard.record.base import Sink
from lightning_nanguard.record.files import append, how_to_write, put_aside, sync
from lightning_nanguard.thresholds.records import RECORDS, RecordsThresholds
from lightning_nanguard.types import Record

_logger = logging.getLogger("lightning_nanguard")


@final
class JsonLines(Sink):
    """Appends one JSON object a line to a file.

    After :meth:`write` has returned, the record is not lost if the process is killed. The file is synchronised with the
    disk at most once a second and in :meth:`close`, so that records survive a crash of the machine, too.

    The folder is created with the first record, so a healthy run writes nothing. If the file cannot be written, the
    newest records wait in memory. The sink tries again with each further record and in :meth:`close`. When the file
    reaches ``thresholds.bytes_per_file``, it is renamed to ``NAME.1.jsonl`` (an older file of this name is replaced),
    and a new one begins. Readers read both.

    Args:
        path: The file. Existing records are kept.
        thresholds: How many records wait in memory at most, and how often a record waits for the disk.
        warns: Whether to warn that the file cannot be written. ``False`` if another file of the folder warns.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from lightning_nanguard.record.files import read_records
        >>> from lightning_nanguard.types import Intervention
        >>> with TemporaryDirectory() as folder:
        ...     sink = JsonLines(f"{folder}/logs/nanguard.jsonl")
        ...     sink.write(Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1))
        ...     [record.global_step for record in read_records(sink.path)]
        [7]
    """

    def __init__(
        self, path: str | os.PathLike[str], thresholds: RecordsThresholds = RECORDS, *, warns: bool = True
    ) -> None:
        most = thresholds.records_waiting_for_file
        require(most >= 1, thresholds, "records_waiting_for_file", most, "at least 1")
        self.path = Path(path)
        self._bytes_per_file = thresholds.bytes_per_file
        self._seconds_between_syncs = thresholds.seconds_between_syncs
        self._waiting: deque[bytes] = deque(maxlen=most)
        self._dropped = 0
        self._warns = warns
        self._warned = not warns
        self._synced = -math.inf
        self._unsynced = False

    def write(self, intervention: Record) -> None:
        """Append the record, or keep it for the next try."""
        line = json.dumps(intervention.to_dict(), allow_nan=False, default=_jsonable).encode() + b"\n"
        self._dropped += len(self._waiting) == self._waiting.maxlen
        self._waiting.append(line)
        error = self._flush()
        if error is not None and not self._warned:
            self._warned = True
            _logger.warning(
                "NaNGuard: cannot write its records to %s: %s. Training goes on, and up to %d records are kept in "
                "memory until the file can be written. %s",
                self.path,
                error,
                self._waiting.maxlen,
                how_to_write(self.path.parent),
            )

    def close(self) -> None:
        """Try once more to write the waiting records, and log a message if they are lost."""
        error = self._flush(last=True)
        if error is not None and self._warns:
            _logger.warning(
                "NaNGuard: %d of its records could not be written to %s: %s.",
                len(self._waiting) + self._dropped,
                self.path,
                error,
            )

    def _flush(self, *, last: bool = False) -> OSError | None:
        if not self._waiting and not (last and self._unsynced):
            return None
        now = time.monotonic()
        lasting = last or now >= self._synced + self._seconds_between_syncs
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_file() and self.path.stat().st_size >= self._bytes_per_file:
                with contextlib.suppress(OSError):  # if it cannot be renamed, records are still appended
                    os.replace(self.path, put_aside(self.path))
            with open(self.path, "a+b", buffering=0) as file:
                while self._waiting:
                    append(file, self._waiting[0], lasting=lasting)
                    self._waiting.popleft()
                if last and self._unsynced:
                    sync(file)
            self._unsynced = not lasting
            self._synced = now if lasting else self._synced
        except OSError as error:
            return error
        if self._dropped:
            _logger.warning("NaNGuard: %s can be written again; %d older records were lost.", self.path, self._dropped)
        self._dropped = 0
        return None


def _jsonable(value: object) -> Any:
    """The JSON value of an object that JSON does not know, such as a NumPy scalar in the evidence."""
    item = getattr(value, "item", None)
    if callable(item):
        with contextlib.suppress(Exception):
            number = item()
            if isinstance(number, float) and not math.isfinite(number):
                return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(number)]
            if isinstance(number, (bool, int, float, str)):
                return number
    return str(value)
