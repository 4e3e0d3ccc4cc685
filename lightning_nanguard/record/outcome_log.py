"""Keeps the outcomes of comparisons beside the run (receipts and trials) in memory, on the console and in a file."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from typing import Generic, TypeVar, final

from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.record.receipts import Receipt
from lightning_nanguard.record.trials import HeldTrial

_logger = logging.getLogger("lightning_nanguard")

_Outcome = TypeVar("_Outcome", Receipt, HeldTrial)


@final
class OutcomeLog(Generic[_Outcome]):
    """Keeps the receipts or the trials of one fit in memory, on the console, and in a file beside the records.

    Args:
        sink: The file; ``None`` keeps them in memory only.
        run_id: Id of the run, which is added to each outcome.

    Attributes:
        given: The outcomes so far, oldest first.
    """

    def __init__(self, sink: JsonLines | None = None, run_id: str = "") -> None:
        self._sink = sink
        self._run_id = run_id
        self.given: list[_Outcome] = []

    def give(self, outcome: _Outcome) -> None:
        """Add one outcome. An error while it is written does not end the run."""
        outcome = replace(outcome, run=self._run_id)
        self.given.append(outcome)
        if self._sink is not None:
            _logger.info("NaNGuard: %s", outcome.told())
            with contextlib.suppress(Exception):
                self._sink.write(outcome)

    def close(self) -> None:
        """Try once more to write outcomes that could not be written."""
        if self._sink is not None:
            with contextlib.suppress(Exception):
                self._sink.close()
