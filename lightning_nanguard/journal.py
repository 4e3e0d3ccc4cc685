"""Records of what the guard did, and the sinks that keep or show them. Standard library only.

Every :class:`~lightning_nanguard.events.Intervention` goes through one :class:`Journal` to many small sinks. A sink of
your own is one class with two methods; whatever it raises is logged and neither ends training nor keeps the record
from the other sinks.

What goes wrong here is told through the logger ``lightning_nanguard``, never through :mod:`warnings`: a user who turns
warnings into errors must not lose a run to a full disk.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import stat
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, final, overload

from lightning_nanguard.detectors import require
from lightning_nanguard.events import SCHEMA_VERSION, Advice, Finding, Intervention

_logger = logging.getLogger("lightning_nanguard")

# Seconds within which no two records wait for the disk.
_SYNC_EVERY = 1.0

_Record = TypeVar("_Record", Intervention, Advice)


class Sink(ABC):
    """Something that keeps or shows interventions.

    Example:
        >>> class Beep(Sink):
        ...     def write(self, intervention):
        ...         print("beep", intervention.fault)
        ...
        ...     def close(self):
        ...         pass
        >>> Journal([Beep()]).write(Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1))
        beep non_finite_loss
    """

    @abstractmethod
    def write(self, intervention: Intervention) -> None:
        """Take one record. Training goes on only after this returns."""

    @abstractmethod
    def close(self) -> None:
        """Called at the end of every fit. More records may follow: the same guard may serve another fit."""


@final
class JsonLines(Sink):
    """Appends one JSON object a line to a file.

    A record outlives the death of the process as soon as :meth:`write` returns. It also waits for the disk, but in a
    burst of records for no more than one a second; the rest follow with the next one and with :meth:`close`.

    The folder is made with the first record, so a healthy run leaves nothing behind. While the file cannot be written,
    the newest ``max_kept`` records wait in memory and are tried again with every next record and with :meth:`close`.

    Args:
        path: The file. What it already holds is kept.
        max_kept: How many records wait in memory at most.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     sink = JsonLines(f"{folder}/logs/nanguard.jsonl")
        ...     sink.write(Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1))
        ...     [record.global_step for record in read_records(sink.path)]
        [7]
    """

    def __init__(self, path: str | os.PathLike[str], *, max_kept: int = 1000) -> None:
        require(max_kept >= 1, self, "max_kept", max_kept, "at least 1")
        self.path = Path(path)
        self._waiting: deque[bytes] = deque(maxlen=max_kept)
        self._dropped = 0
        self._warned = False
        self._synced = -math.inf
        self._unsynced = False

    def write(self, intervention: Intervention | Advice) -> None:
        """Append the record, or keep it for the next try."""
        line = json.dumps(intervention.to_dict(), allow_nan=False, default=_jsonable).encode()
        self._dropped += len(self._waiting) == self._waiting.maxlen
        self._waiting.append(line)
        error = self._flush()
        if error is not None and not self._warned:
            self._warned = True
            _logger.warning(
                "NaNGuard: cannot write its records to %s: %s. Training goes on and up to %d records are kept in "
                "memory; they are written once the file can be. Free space there or make the folder writable, or "
                "choose another folder for the next run.",
                self.path,
                error,
                self._waiting.maxlen,
            )

    def close(self) -> None:
        """Try once more to write what waits, and say so if it is lost."""
        error = self._flush(last=True)
        if error is not None:
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
        lasting = last or now >= self._synced + _SYNC_EVERY
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a buffer left over from a full disk would be written again on closing the file.
            with open(self.path, "a+b", buffering=0) as file:
                while self._waiting:
                    _append(file, self._waiting[0], lasting=lasting)
                    self._waiting.popleft()
                if last and self._unsynced:
                    _sync(file)
            self._unsynced = not lasting
            self._synced = now if lasting else self._synced
        except OSError as error:
            return error
        if self._dropped:
            _logger.warning("NaNGuard: %s can be written again; %d older records were lost.", self.path, self._dropped)
        self._dropped = 0
        return None


def _append(file: FileIO, line: bytes, *, lasting: bool) -> None:
    """Add a line and, if ``lasting``, wait until it is on the disk; a failed try leaves the file as it was."""
    status = os.fstat(file.fileno())
    torn = False
    if status.st_size:
        file.seek(-1, os.SEEK_END)
        torn = file.read(1) != b"\n"
    # What a killed run left without an end would swallow the record that follows it.
    rest = memoryview((b"\n" if torn else b"") + line + b"\n")
    try:
        while rest:
            rest = rest[file.write(rest) :]
        if lasting:
            _sync(file)
    except BaseException:
        # Half of a record, or one that may not last, would show twice after the next try.
        with contextlib.suppress(OSError):
            file.truncate(status.st_size)
        raise


def _sync(file: FileIO) -> None:
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        os.fsync(file.fileno())


def _jsonable(value: object) -> Any:
    """What stands for a value JSON does not know, such as a NumPy scalar among the evidence."""
    item = getattr(value, "item", None)
    if callable(item):
        with contextlib.suppress(Exception):
            number = item()
            if isinstance(number, float) and not math.isfinite(number):
                return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(number)]
            if isinstance(number, (bool, int, float, str)):
                return number
    return str(value)


def read_records(path: str | os.PathLike[str]) -> list[Intervention]:
    """The records of a file that :class:`JsonLines` wrote, oldest first.

    Lines that are no records, such as one torn by a killed run, are left out with one logged warning. Records of later
    versions are read as far as this version knows their fields.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: When there is no such file. A run in which nothing happened writes none.
    """
    return _read(path, Intervention.from_dict)


def read_advice(path: str | os.PathLike[str]) -> list[Advice]:
    """The advice of a file that :class:`Adviser` wrote, oldest first; see :func:`read_records`.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: When there is no such file. A run in which nothing was noticed writes none.
    """
    return _read(path, Advice.from_dict)


def _read(path: str | os.PathLike[str], parse: Callable[[Mapping[str, Any]], _Record]) -> list[_Record]:
    records: list[_Record] = []
    unreadable: list[int] = []
    later = False
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                data = json.loads(line)
                later = later or (isinstance(data, dict) and _is_later(data.get("schema")))
                records.append(parse(data))
            # A torn or overwritten line can be anything: wrong bytes, another type, brackets without end.
            except (ValueError, TypeError, AttributeError, RecursionError):
                unreadable.append(number)
    if unreadable:
        _logger.warning(
            "NaNGuard: %s: left out %s, no readable record there; %s.",
            os.fspath(path),
            _listed("line", unreadable),
            "the file holds records of a later version: update lightning-nanguard to read them"
            if later
            else "a run that was killed while writing leaves such a line, the other records are complete",
        )
    return records


def _is_later(schema: object) -> bool:
    return isinstance(schema, int) and schema > SCHEMA_VERSION


@final
class Console(Sink):
    """Logs one readable line per intervention at level WARNING, ever fewer when the same thing keeps happening.

    Interventions of one fault with the same remedies are one kind. The first ``show_first`` of a kind are shown, then
    its 2 · ``show_first``-th, 4 · ``show_first``-th, 8 · ``show_first``-th … with the number left out in between; one
    that stops the run is always shown. What is shown depends on counts only, never on time. :meth:`close` says how
    many were not shown and starts counting anew.

    Args:
        rank_zero: Whether this process is the one that speaks; with ``False`` nothing is shown.
        show_first: How many of a kind are shown before they are thinned out.

    Example:
        >>> Console(show_first=5).write(Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1))
    """

    def __init__(self, *, rank_zero: bool = True, show_first: int = 10) -> None:
        require(show_first >= 1, self, "show_first", show_first, "at least 1")
        self.rank_zero = rank_zero
        self.show_first = show_first
        self._kinds: dict[tuple[str, tuple[str, ...]], _Kind] = {}

    def write(self, intervention: Intervention) -> None:
        """Show the intervention, or count it."""
        if not self.rank_zero:
            return
        key = (intervention.fault, intervention.remedies)
        kind = self._kinds.get(key, _Kind(seen=0, shown=0, next_shown=1))
        seen = kind.seen + 1
        if seen < kind.next_shown and "stop" not in intervention.remedies:
            self._kinds[key] = kind._replace(seen=seen)
            return
        left_out = seen - 1 - kind.last_shown
        note = f" (and {left_out:,} more like it since the last one shown)" if left_out else ""
        if seen == self.show_first:
            note += " (more like it will be shown ever more rarely)"
        _logger.warning("NaNGuard: %s%s", describe(intervention), note)
        next_shown = kind.next_shown
        if seen >= next_shown:
            next_shown = seen + 1 if seen < self.show_first else 2 * seen
        self._kinds[key] = _Kind(seen, kind.shown + 1, next_shown, last_shown=seen)

    def close(self) -> None:
        """Say how many were not shown."""
        seen = sum(kind.seen for kind in self._kinds.values())
        hidden = seen - sum(kind.shown for kind in self._kinds.values())
        self._kinds.clear()
        if hidden:
            _logger.warning("NaNGuard: %s of %s were not shown here.", f"{hidden:,}", _counted(seen, "intervention"))


class _Kind(NamedTuple):
    seen: int
    shown: int
    next_shown: int
    last_shown: int = 0


def describe(intervention: Intervention) -> str:
    """One line for a person.

    Args:
        intervention: What happened.

    Example:
        >>> describe(Intervention(412, 3, 12, "exploding_loss", "loss", ("restore", "scale"), 0.1, 0.05, 400))
        'step 412 (epoch 3, batch 12): exploding_loss in loss; went back to step 400, learning rate 0.1 → 0.05'
    """
    batch = f", batch {intervention.batch_idx}" if intervention.batch_idx >= 0 else ""
    place = f" in {intervention.place}" if intervention.place else ""
    if intervention.message:
        why = f" ({intervention.message.rstrip('. ')})"
    elif intervention.value is not None:
        why = f" ({intervention.value:.4g})"
    else:
        why = ""
    text = (
        f"step {intervention.global_step} (epoch {intervention.epoch}{batch}): {intervention.fault}{place}{why}; "
        f"{_done(intervention)}{_cause(intervention)}"
    )
    # Names and messages come from outside, and one intervention is one line.
    return " ".join(text.split())


_PHRASES = {
    "skip": ("skipped the batch", "skipped the batch"),
    "restore": ("went back to {to}", "gone back to {to}"),
    "scale": ("learning rate {lr}", "changed the learning rate {lr}"),
    "clip": ("turned gradient clipping on", "turned gradient clipping on"),
    "reset moments": ("emptied the optimizer's state", "emptied the optimizer's state"),
    "undo": ("put back what the batch had touched", "put back what the batch had touched"),
    "resume": ("went on from another checkpoint", "gone on from another checkpoint"),
    "rewrite": ("wrote the last good state in its place", "written the last good state in its place"),
    "stop": ("stopped the run", "stopped the run"),
}


def _done(intervention: Intervention) -> str:
    applied, before, after = intervention.applied, intervention.lr_before, intervention.lr_after
    to = "an earlier state" if intervention.snapshot_step is None else f"step {intervention.snapshot_step}"
    if intervention.updates_lost:
        to += f" ({intervention.updates_lost} update{'s' * (intervention.updates_lost > 1)} lost)"
    known = before is not None and after is not None and before != after
    rate = f"{before:.4g} → {after:.4g}" if known else "changed" if applied else ""
    words = list(intervention.remedies)
    if known and "scale" not in words:
        # A remedy of the user's own may change the rate under a word of its own.
        words.append("scale")
    parts = [_PHRASES[word][not applied].format(to=to, lr=rate).strip() if word in _PHRASES else word for word in words]
    text = ", ".join(parts) or ("did nothing" if applied else "done nothing")
    return text if applied else f"would have {text}"


def _cause(intervention: Intervention) -> str:
    finding = intervention.finding
    if finding is None:
        return f"; cause: {intervention.cause}" if intervention.cause else ""
    return f"; cause: {describe_finding(finding)}"


def describe_finding(finding: Finding) -> str:
    """A finding in one line.

    Example:
        >>> describe_finding(Finding("dead_relu", 0.9, place="net.1 (ReLU)", suggestion="Lower the learning rate."))
        'dead_relu in net.1 (ReLU): Lower the learning rate.'
    """
    place = f" in {finding.place}" if finding.place else ""
    samples = f" ({_listed('sample', finding.samples)})" if finding.samples else ""
    suggestion = f": {finding.suggestion}" if finding.suggestion else ""
    return " ".join(f"{finding.cause}{place}{samples}{suggestion}".split())


def describe_advice(advice: Advice) -> str:
    """One line for a person.

    Args:
        advice: What was noticed.

    Example:
        >>> describe_advice(Advice(0, 0, "preflight", Finding("dead_relu", 0.9, place="net.1 (ReLU)")))
        'step 0 (epoch 0), advice (preflight): dead_relu in net.1 (ReLU)'
    """
    where = f"step {advice.global_step} (epoch {advice.epoch}), advice ({advice.occasion})"
    return f"{where}: {describe_finding(advice.finding)}"


@final
class Adviser:
    """Keeps advice: in memory, on the console, and in a file of its own beside the records.

    What was said once is not said again, and no more than ``max_kept`` pieces are.

    Args:
        sink: The file, ``None`` to keep it in memory only, without a word on the console.
        max_kept: How much advice is taken at most.

    Example:
        >>> adviser = Adviser()
        >>> adviser.give(Advice(0, 0, "preflight", Finding("dead_relu", 0.9)))
        >>> len(adviser.given)
        1
    """

    def __init__(self, sink: JsonLines | None = None, *, max_kept: int = 100) -> None:
        require(max_kept >= 1, self, "max_kept", max_kept, "at least 1")
        self._sink = sink
        self._max_kept = max_kept
        self._said: set[tuple[str, str, str]] = set()
        self.given: list[Advice] = []

    def give(self, advice: Advice) -> None:
        """Take one piece of advice; whatever goes wrong while it is written ends no run."""
        said = (advice.occasion, advice.finding.cause, advice.finding.place)
        if said in self._said or len(self.given) >= self._max_kept:
            return
        self._said.add(said)
        self.given.append(advice)
        if self._sink is not None:
            _logger.warning("NaNGuard: %s", describe_advice(advice))
            with contextlib.suppress(Exception):
                self._sink.write(advice)

    def close(self) -> None:
        """Try once more to write what could not be written."""
        if self._sink is not None:
            with contextlib.suppress(Exception):
                self._sink.close()


@final
class Memory(Sink, Sequence[Intervention]):
    """The newest interventions and the counts of all: what ``guard.interventions`` is.

    It reads like a tuple, equals any sequence of the same interventions, and slices to tuples. Only the guard writes.

    Args:
        maxlen: How many interventions are kept; older ones stay in the counts.

    Attributes:
        total: Number of all interventions written.
        faults: How often each fault was written.
        remedies: How often each remedy was written.

    Example:
        >>> memory = Memory(maxlen=2)
        >>> for step in range(5):
        ...     memory.write(Intervention(step, 0, step, "non_finite_loss", "loss", ("skip",), 0.1, 0.1))
        >>> len(memory), memory[-1].global_step, memory.total, memory.remedies["skip"]
        (2, 4, 5, 5)
    """

    def __init__(self, maxlen: int = 1000) -> None:
        require(maxlen >= 1, self, "maxlen", maxlen, "at least 1")
        self._newest: deque[Intervention] = deque(maxlen=maxlen)
        self.total = 0
        self.faults: Counter[str] = Counter()
        self.remedies: Counter[str] = Counter()

    @property
    def maxlen(self) -> int:
        """How many interventions are kept."""
        return self._newest.maxlen or 0

    def write(self, intervention: Intervention) -> None:
        """Keep the intervention in the place of the oldest."""
        self._newest.append(intervention)
        self.total += 1
        self.faults[intervention.fault] += 1
        self.remedies.update(intervention.remedies)

    def close(self) -> None:
        """Nothing: what is remembered outlives the fit."""

    def __len__(self) -> int:
        return len(self._newest)

    @overload
    def __getitem__(self, index: int) -> Intervention: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Intervention, ...]: ...
    def __getitem__(self, index: int | slice) -> Intervention | tuple[Intervention, ...]:
        return tuple(self._newest)[index] if isinstance(index, slice) else self._newest[index]

    def __iter__(self) -> Iterator[Intervention]:
        # Of a copy: the guard may write while somebody's loop looks on.
        return iter(tuple(self._newest))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Sequence) and not isinstance(other, (str, bytes)):
            return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        older = self.total - len(self)
        return f"Memory({list(self._newest)}{f', and {older} older' if older else ''})"


@final
class Journal:
    """Writes every intervention to each of its sinks.

    A sink that raises is logged the first time, with its name and the fault; the others get the record all the same,
    training goes on, and the sink is asked again with the next record.

    Args:
        sinks: Where the records go, in this order.

    Example:
        >>> memory = Memory()
        >>> journal = Journal([memory, Console(rank_zero=False)])
        >>> journal.write(Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1))
        >>> memory.total
        1
    """

    def __init__(self, sinks: Iterable[Sink]) -> None:
        if isinstance(sinks, Sink):
            raise TypeError(f"Expected argument `sinks` to be a list of sinks, but got one: write [{sinks!r}]")
        self.sinks = tuple(sinks)
        for sink in self.sinks:
            if not isinstance(sink, Sink):
                raise TypeError(f"Expected argument `sinks` to hold instances of Sink, but got {sink!r}")
        self._failed: Counter[int] = Counter()

    def write(self, intervention: Intervention) -> None:
        """Give the intervention to each sink."""
        for index in range(len(self.sinks)):
            with self._survive(index, "could not take a record"):
                self.sinks[index].write(intervention)

    def close(self) -> None:
        """Close each sink, and say how many records each one missed."""
        for index, sink in enumerate(self.sinks):
            missed = self._failed.pop(index, 0)
            if missed:
                _logger.warning("NaNGuard: the sink %s missed %s.", _name(sink), _counted(missed, "record"))
            with self._survive(index, "could not be closed"):
                sink.close()
            self._failed.pop(index, 0)

    @contextlib.contextmanager
    def _survive(self, index: int, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a sink raises is no reason to lose a run
            self._failed[index] += 1
            if self._failed[index] == 1:
                _logger.warning(
                    "NaNGuard: the sink %s %s: %s: %s. Training goes on and the other sinks get every record.",
                    _name(self.sinks[index]),
                    what,
                    type(error).__name__,
                    error,
                    exc_info=error,
                )


def _name(sink: Sink) -> str:
    return f"{type(sink).__module__}.{type(sink).__qualname__}"


_ACTIONS = {
    "skip": ("batch skipped", "batches skipped"),
    "restore": ("rollback", "rollbacks"),
    "scale": ("change of the learning rate", "changes of the learning rate"),
    "clip": ("change of gradient clipping", "changes of gradient clipping"),
    "reset moments": ("reset of the optimizer's state", "resets of the optimizer's state"),
    "undo": ("half batch undone", "half batches undone"),
    "resume": ("other checkpoint gone on from", "other checkpoints gone on from"),
    "rewrite": ("checkpoint written with the last good state", "checkpoints written with the last good state"),
    "stop": ("stop", "stops"),
}


def summary(
    updates: int,
    faults: Mapping[str, int] | None = None,
    remedies: Mapping[str, int] | None = None,
    *,
    lr_multiplier: float = 1.0,
    path: str | os.PathLike[str] | None = None,
    observe: bool = False,
) -> str:
    """The one line at the end of a fit.

    Args:
        updates: Number of updates watched.
        faults: How often each fault was met, such as :attr:`Memory.faults`.
        remedies: How often each remedy was used, such as :attr:`Memory.remedies`.
        lr_multiplier: What the learning rate is multiplied with at the end.
        path: Where the records lie.
        observe: Whether the guard only looked on.

    Example:
        >>> summary(1200)
        'NaNGuard: 1,200 updates watched, nothing to do'
        >>> summary(1200, {"non_finite_loss": 1}, {"skip": 1}, path="guard.jsonl")
        'NaNGuard: 1,200 updates watched, 1 intervention (non_finite_loss 1): 1 batch skipped; records in guard.jsonl'
    """
    rate = f"; the learning rate ends at {lr_multiplier:.4g} times its schedule" if lr_multiplier != 1.0 else ""
    watched = f"NaNGuard: {_counted(updates, 'update')} watched"
    total = sum((faults or {}).values())
    if not total:
        return f"{watched}, nothing to do{rate}"
    # Counters keep the order of arrival; the line must not depend on it.
    met = ", ".join(f"{kind} {count:,}" for kind, count in sorted((faults or {}).items(), key=_most_first))
    used = sorted((remedies or {}).items(), key=_most_first)
    done = ", ".join(_counted(count, *_ACTIONS.get(word, (f"× {word}", f"× {word}"))) for word, count in used)
    verb = "would have been " if observe else ""
    acted = f": {verb}{done}" if done else ""
    where = f"; records in {os.fspath(path)}" if path is not None else ""
    noun = "fault found, only observed" if observe else "intervention"
    nouns = "faults found, only observed" if observe else "interventions"
    return f"{watched}, {_counted(total, noun, nouns)} ({met}){acted}{rate}{where}"


def _most_first(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


def _counted(number: int, noun: str, nouns: str | None = None) -> str:
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


def _listed(noun: str, numbers: Sequence[int], at_most: int = 8) -> str:
    more = len(numbers) - at_most
    shown = ", ".join(str(number) for number in islice(numbers, at_most))
    return f"{noun}{'s' if len(numbers) > 1 else ''} {shown}{f' and {more:,} more' if more > 0 else ''}"
