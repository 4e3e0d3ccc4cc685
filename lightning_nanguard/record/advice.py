"""Keeps advice in memory, on the console and in a file."""

from __future__ import annotations

import contextlib
import logging
from typing import final

from lightning_nanguard.errors import require
from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.record.messages import describe_advice
from lightning_nanguard.types import Advice

_logger = logging.getLogger("lightning_nanguard")


@final
class AdviceLog:
    """Keeps advice: in memory, on the console, and in a file of its own beside the records.

    What was said once is not said again, and no more than ``max_kept`` pieces are.

    Args:
        sink: The file, ``None`` to keep it in memory only, without a word on the console.
        max_kept: How much advice is taken at most.

    Example:
        >>> adviser = AdviceLog()
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
