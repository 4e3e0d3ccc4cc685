"""The bad samples of a run: how they are counted, stored and shown."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TextIO, final

from lightning_nanguard.record.files import read_file
from lightning_nanguard.record.text import printable
from lightning_nanguard.types import Record, Row, from_plain

_HASH = "hash "


def hash_key(name: str) -> str:
    """The key of a sample without a row."""
    return f"{_HASH}{name}"


@final
class KnownSamples:
    """Counts how often each bad sample was found, in all fits of a run.

    Args:
        quarantine: Whether rows that are known to be bad are left out of later batches.

    Attributes:
        quarantine: Whether rows are left out.
        left_out: Rows that are left out of every batch drawn from now on.
        hashes: Hashes of samples without rows that are left out.

    Example:
        >>> known = KnownSamples(quarantine=True)
        >>> known.met(100), known.met(100), known.left_out
        (1, 2, {100})
    """

    def __init__(self, *, quarantine: bool = False) -> None:
        self.quarantine = quarantine
        self._times: dict[Row, int] = {}
        self.left_out: set[Row] = set()
        self.hashes: set[str] = set()

    def met(self, key: Row) -> int:
        """Count a sample; return how often it was found so far.

        Args:
            key: Its row, or the result of :func:`hash_key`.
        """
        times = self._times[key] = self._times.get(key, 0) + 1
        if self.quarantine:
            self._leave_out(key)
        return times

    def __len__(self) -> int:
        """Number of different samples found so far."""
        return len(self._times)

    def times(self, key: Row) -> int:
        """How often a sample was found so far."""
        return self._times.get(key, 0)

    def _leave_out(self, key: Row) -> None:
        if isinstance(key, str) and key.startswith(_HASH):
            self.hashes.add(key.removeprefix(_HASH))
        else:
            self.left_out.add(key)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers."""
        return {"times": [[key, times] for key, times in self._times.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`. Checkpoints of earlier versions lack this state."""
        for key, times in state.get("times", ()):
            self._times[key] = int(times)
            if self.quarantine:
                self._leave_out(key)


BAD_SAMPLES_FILE = "bad_samples.jsonl"
"""Name of the file in a run's folder of records."""


@final
@dataclass(frozen=True, slots=True)
class BadSample(Record):
    """One bad sample of a batch.

    Attributes:
        cause: Why it counts as bad: ``"not finite"``, ``"out of proportion"``, or the cause that the diagnosis found.
        row: Row of the data set; ``None`` if the data have no rows.
        hash: Its hash by :func:`~lightning_nanguard.sample_hash`.
        columns: The bad columns of each field of the batch. An empty tuple means all columns.
        epoch: Epoch in which it was found.
        batch: Index of its batch in that epoch, Lightning's ``batch_idx``.
        index: Its place in that batch.
        rank: Rank of the process that found it.
        global_step: The trainer's ``global_step`` at that time.
        times: How often it was found so far.
        run: Id of the run.
        position: Number of batches that the loader returned before its batch, if it differs from ``batch``. It differs
            after a resume within an epoch if the loader does not save its position.
    """

    cause: str
    row: Row | None = None
    hash: str = ""
    columns: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    epoch: int = 0
    batch: int = 0
    index: int = 0
    rank: int = 0
    global_step: int = 0
    times: int = 1
    run: str = ""
    position: int | None = None

    @property
    def key(self) -> Row:
        """The key that identifies it: its row, else its hash."""
        if self.row is not None:
            return self.row
        return hash_key(self.hash or f"not known (epoch {self.epoch}, batch {self.batch}, {self.index}, {self.rank})")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BadSample:
        """The inverse of :meth:`to_dict`; keys of later versions are ignored.

        Raises:
            ValueError: If ``data`` is not a record of a sample.
        """
        return from_plain(cls, data, "record of a bad sample", columns=_columns_of)


def _columns_of(columns: Mapping[str, list[int]]) -> dict[str, tuple[int, ...]]:
    return {str(name): tuple(found) for name, found in columns.items()}


def merged(samples: Iterable[BadSample]) -> list[BadSample]:
    """Merge the records of each sample into its first one, with the count of all; ordered by row.

    Args:
        samples: The records, the oldest first.
    """
    found: dict[Row, BadSample] = {}
    met: Counter[Row] = Counter()
    for one in samples:
        met[one.key] += 1
        first = found.setdefault(one.key, one)
        # A resumed run restarts from the count in its checkpoint, so the largest count is used.
        found[one.key] = replace(first, times=max(first.times, one.times, met[one.key]))
    return sorted(found.values(), key=_order)


def _order(sample: BadSample) -> tuple[bool, int, str, int, int]:
    row = sample.row if isinstance(sample.row, int) else 0
    return not isinstance(sample.row, int), row, str(sample.row or ""), sample.epoch, sample.batch


def read_bad_samples(path: str | os.PathLike[str]) -> list[BadSample]:
    """Read the bad samples of a file, the oldest first. Lines that are not records are left out
    with one logged warning.

    Raises:
        FileNotFoundError: If there is no such file. A run without bad samples writes none.
    """
    return read_file(path, BadSample.from_dict)


def describe_sample(sample: BadSample) -> str:
    """Describe one sample in one line.

    Example:
        >>> where = {"epoch": 1, "batch": 6, "index": 4, "global_step": 27}
        >>> describe_sample(BadSample("not finite", 100, columns={"0": (2,)}, times=3, **where))
        'row 100: not finite in field 0, column 2; seen 3 times, first at step 27, epoch 1, batch 6, sample 4'
    """
    rank = f", rank {sample.rank}" if sample.rank else ""
    seen = f"seen {sample.times:,} times, first" if sample.times > 1 else "seen"
    loader = "" if sample.position is None else f" (batch {sample.position} since the loader began anew)"
    place = f"epoch {sample.epoch}, batch {sample.batch}{loader}, sample {sample.index}{rank}"
    return f"{describe_fault(sample)}; {seen} at step {sample.global_step}, {place}"


def describe_fault(sample: BadSample) -> str:
    """Describe which sample it is, and its fault.

    Example:
        >>> describe_fault(BadSample("not finite", 100, columns={"0": (2,)}))
        'row 100: not finite in field 0, column 2'
    """
    name = f"sample with hash {sample.hash}" if sample.hash else f"sample {sample.index} of batch {sample.batch}"
    where = "; ".join(f"field {one}{_columns(found)}" for one, found in sample.columns.items())
    name = name if sample.row is None else f"row {sample.row}"
    return f"{name}: {sample.cause}{f' in {where}' if where else ''}"


def _columns(columns: tuple[int, ...]) -> str:
    return f", column{'s' * (len(columns) > 1)} {', '.join(map(str, columns))}" if columns else ""


def write_csv(samples: Iterable[BadSample], file: TextIO) -> None:
    """Write samples as CSV with a header."""
    names = [one.name for one in fields(BadSample)]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names)
    for one in samples:
        columns = "; ".join(f"{name}: {' '.join(map(str, found))}".strip() for name, found in one.columns.items())
        values = {**asdict(one), "columns": columns, "row": "" if one.row is None else one.row}
        cells = (values[name] for name in names)
        writer.writerow([printable(cell) if isinstance(cell, str) else cell for cell in cells])
