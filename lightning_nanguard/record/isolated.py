"""A wrapper that catches and logs the exceptions of a sink."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import final

from lightning_nanguard.record.base import RunInfo, Sink
from lightning_nanguard.record.callable_sink import CallableSink
from lightning_nanguard.record.text import counted, name_of
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
