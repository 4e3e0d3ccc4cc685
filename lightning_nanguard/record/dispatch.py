"""Gives every record to each sink of one fit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

from lightning_nanguard.record.background import BackgroundSink
from lightning_nanguard.record.base import RunInfo, Sink
from lightning_nanguard.record.isolated import IsolatedSink
from lightning_nanguard.thresholds.records import RECORDS, RecordsThresholds
from lightning_nanguard.types import Intervention


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
