"""Keeps advice in memory, on the console and in a file."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from typing import final

from lightning_nanguard.errors import require
from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.record.messages import describe_advice
from lightning_nanguard.thresholds.records import RECORDS, RecordsThresholds
from lightning_nanguard.types import Advice

_logger = logging.getLogger("lightning_nanguard")


@final
class AdviceLog:
    """Keeps the advice of one fit in memory, on the console, and in a file of its own beside the records.

    The same advice is kept only once, and the number of pieces is bounded.

    Args:
        sink: The file; ``None`` keeps advice in memory only and shows none on the console.
        thresholds: How many pieces of advice are kept.
        run_id: Id of the run, which is added to each piece of advice.

    Attributes:
        given: The advice so far, oldest first.

    Example:
        >>> from lightning_nanguard.types import Finding
        >>> advice = AdviceLog()
        >>> advice.give(Advice(0, 0, "preflight", Finding("dead_relu", 0.9)))
        >>> len(advice.given)
        1
    """

    def __init__(
        self, sink: JsonLines | None = None, thresholds: RecordsThresholds = RECORDS, run_id: str = ""
    ) -> None:
        self._sink = sink
        self._run_id = run_id
        self._thresholds = thresholds
        self._most = thresholds.advice_per_fit
        require(self._most >= 1, thresholds, "advice_per_fit", self._most, "at least 1")
        self._said: set[tuple[str, str, str]] = set()
        self.given: list[Advice] = []

    def give(self, advice: Advice) -> None:
        """Add one piece of advice. An error while it is written does not end the run."""
        said = (advice.occasion, advice.finding.cause, advice.finding.place)
        if said in self._said or len(self.given) >= self._most:
            return
        self._said.add(said)
        advice = replace(advice, run=self._run_id)
        self.given.append(advice)
        if self._sink is not None:
            _logger.warning("NaNGuard: %s", describe_advice(advice, self._thresholds))
            with contextlib.suppress(Exception):
                self._sink.write(advice)

    def close(self) -> None:
        """Try once more to write advice that could not be written."""
        if self._sink is not None:
            with contextlib.suppress(Exception):
                self._sink.close()
