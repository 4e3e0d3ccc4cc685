"""Writes every record to each sink; what a sink raises costs neither the run nor the other sinks."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import final

from lightning_nanguard.record.base import Sink
from lightning_nanguard.record.messages import counted
from lightning_nanguard.types import Intervention

_logger = logging.getLogger("lightning_nanguard")


@final
class SinkDispatcher:
    """Writes every intervention to each of its sinks.

    A sink that raises is logged the first time, with its name and the fault; the others get the record all the same,
    training goes on, and the sink is asked again with the next record.

    Args:
        sinks: Where the records go, in this order.

    Example:
        >>> memory = Memory()
        >>> journal = SinkDispatcher([memory, Console(rank_zero=False)])
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
                _logger.warning("NaNGuard: the sink %s missed %s.", _name(sink), counted(missed, "record"))
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
