"""Gives every record to each sink of one fit, so that no sink can end the run, and a slow one does not delay it."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import final

from lightning_nanguard.errors import require
from lightning_nanguard.record.base import CallableSink, RunInfo, Sink
from lightning_nanguard.record.text import counted, name_of
from lightning_nanguard.thresholds.records import RECORDS, RecordsThresholds
from lightning_nanguard.types import Intervention

_logger = logging.getLogger("lightning_nanguard")


@final
class IsolatedSink(Sink):
    """Passes everything on to a sink. An exception of the sink is logged the first time, with its name, and not raised.

    After an exception the sink still gets the next record. Closing logs how many records it missed.

    Args:
        sink: The sink.
        catches: The exceptions that are caught. In the training thread, Ctrl-C and SystemExit must not be caught.

    Attributes:
        name: Name of the sink in messages.
    """

    def __init__(self, sink: Sink, *, catches: type[BaseException] = Exception) -> None:
        self.name = name_of(sink.function if isinstance(sink, CallableSink) else sink)
        self._sink = sink
        self._catches = catches
        self._told = False
        self._missed = 0

    def open(self, run: RunInfo) -> None:
        """Open the sink."""
        with self._isolated("could not be opened"):
            self._sink.open(run)

    def write(self, intervention: Intervention) -> None:
        """Give the sink a record. If it raises, count the record as missed."""
        self._missed += 1
        with self._isolated("could not take a record"):
            self._sink.write(intervention)
            self._missed -= 1

    def close(self) -> None:
        """Log how many records the sink missed, and close it."""
        if self._missed:
            _logger.warning("NaNGuard: the sink %s missed %s.", self.name, counted(self._missed, "record"))
        self._missed, self._told = 0, False
        with self._isolated("could not be closed"):
            self._sink.close()

    @contextlib.contextmanager
    def _isolated(self, failed: str) -> Iterator[None]:
        try:
            yield
        except self._catches as error:
            if self._told:
                return
            self._told = True
            _logger.warning(
                "NaNGuard: the sink %s %s: %s: %s. Training goes on and the other sinks get every record.",
                self.name,
                failed,
                type(error).__name__,
                error,
                exc_info=error,
            )


@final
class BackgroundSink(Sink):
    """Opens a sink, writes to it and closes it from one daemon thread, from :meth:`open` to :meth:`close`.

    Records wait in a bounded queue. If it is full, the oldest is dropped and counted. Exceptions of the sink are
    handled as in :class:`IsolatedSink`.

    Args:
        sink: The slow sink.
        seconds: Longest time that :meth:`close` waits, in seconds.
        thresholds: How many records may wait.
    """

    def __init__(self, sink: Sink, seconds: float, thresholds: RecordsThresholds) -> None:
        # In a thread, SystemExit would also end the thread silently, so it is caught, too.
        self._sink = IsolatedSink(sink, catches=BaseException)
        self._seconds = seconds
        self._queue = RecordQueue(thresholds)
        self._thread: threading.Thread | None = None

    def open(self, run: RunInfo) -> None:
        """Start the thread, which opens the sink."""
        self._thread = threading.Thread(
            target=_serve, args=(self._sink, self._queue, run), name=f"nanguard {self._sink.name}", daemon=True
        )
        self._thread.start()

    def write(self, intervention: Intervention) -> None:
        """Put the record into the queue of the thread."""
        self._queue.put(intervention)

    def close(self) -> None:
        """Wait for the thread to write all records, at most ``seconds``, and log how many were not written."""
        thread, self._thread = self._thread, None
        self._queue.end()
        if thread is not None:
            thread.join(self._seconds)
        dropped, left = self._queue.abandon()
        reasons = [f"{dropped:,} dropped because too many were waiting"] if dropped else []
        if left:
            reasons.append(f"{left:,} still to be written after its timeout of {self._seconds:g} s")
        if reasons:
            _logger.warning(
                "NaNGuard: the sink %s did not write %s: %s.",
                self._sink.name,
                counted(dropped + left, "record"),
                ", ".join(reasons),
            )
        elif thread is not None and thread.is_alive():
            _logger.warning(
                "NaNGuard: the sink %s was not closed within its timeout of %g s.", self._sink.name, self._seconds
            )


@final
class RecordQueue:
    """The queue of records from the training thread to the thread of a slow sink."""

    def __init__(self, thresholds: RecordsThresholds) -> None:
        most = thresholds.records_waiting_in_background
        require(most >= 1, thresholds, "records_waiting_in_background", most, "at least 1")
        self._waiting: deque[Intervention] = deque(maxlen=most)
        self._changed = threading.Condition()
        self._dropped = 0
        self._taken = 0
        self._ended = self._abandoned = False

    def put(self, record: Intervention) -> None:
        """Add a record. If the queue is full, it replaces the oldest."""
        with self._changed:
            self._dropped += len(self._waiting) == self._waiting.maxlen
            self._waiting.append(record)
            self._changed.notify()

    def take(self) -> Intervention | None:
        """Wait for the oldest record and take it; ``None`` at the end. The record taken before counts as written."""
        with self._changed:
            self._taken = 0
            self._changed.wait_for(lambda: self._waiting or self._ended)
            if not self._waiting:
                return None
            self._taken = 1
            return self._waiting.popleft()

    def end(self) -> None:
        """Mark the end: no more records will be added."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def abandon(self) -> tuple[int, int]:
        """Give up the records that are not written; return how many were dropped and how many are left."""
        with self._changed:
            counts = self._dropped, len(self._waiting) + self._taken
            self._waiting.clear()
            self._dropped = self._taken = 0
            self._abandoned = True
            return counts

    def abandoned(self) -> bool:
        """Whether the fit no longer waits for the sink."""
        with self._changed:
            return self._abandoned


def _serve(sink: Sink, queue: RecordQueue, run: RunInfo) -> None:
    sink.open(run)
    while (record := queue.take()) is not None:
        sink.write(record)
    # Not closed if the thread is late, because the next fit may already have opened the sink.
    if not queue.abandoned():
        sink.close()


@final
class SinkDispatcher:
    """Opens the sinks of one fit, gives each of them every intervention, and closes them.

    If a sink raises, the run and the other sinks go on. A sink with a ``timeout`` is called from a separate thread. On
    other ranks than 0 only sinks with ``every_rank`` are used.

    Args:
        sinks: The sinks that get the records, in this order.
        run: Facts about the fit for the sinks.
        thresholds: How many records wait for a slow sink.

    Attributes:
        sinks: The sinks that are used on this rank.

    Example:
        >>> from lightning_nanguard.record.memory import Memory
        >>> memory = Memory()
        >>> dispatcher = SinkDispatcher([memory], RunInfo())
        >>> dispatcher.write(Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1))
        >>> memory.total
        1
    """

    def __init__(self, sinks: Iterable[Sink], run: RunInfo, thresholds: RecordsThresholds = RECORDS) -> None:
        self.sinks = tuple(sink for sink in sinks if run.rank == 0 or sink.every_rank)
        self._run = run
        self._safe = [
            IsolatedSink(sink) if sink.timeout is None else BackgroundSink(sink, sink.timeout, thresholds)
            for sink in self.sinks
        ]

    def open(self) -> None:
        """The fit begins."""
        for sink in self._safe:
            sink.open(self._run)

    def write(self, intervention: Intervention) -> None:
        """Give the intervention to each sink."""
        for sink in self._safe:
            sink.write(intervention)

    def close(self) -> None:
        """The fit is over."""
        for sink in self._safe:
            sink.close()
