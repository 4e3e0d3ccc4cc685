"""Keeps the advice, receipts and trials of a fit in memory, on the console and in files."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Generic, TypeVar, final

from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.record.receipts import Receipt
from lightning_nanguard.record.trials import HeldTrial
from lightning_nanguard.types import Advice

_logger = logging.getLogger("lightning_nanguard")

_Record = TypeVar("_Record", Advice, Receipt, HeldTrial)


@final
class FitLog(Generic[_Record]):
    """Keeps the advice, the receipts or the trials of one fit in memory, on the console, and in a file of their own.

    Args:
        in_words: Describes a record in one line.
        sink: The file; ``None`` keeps records in memory only and shows none on the console.
        run_id: Id of the run, which is added to each record.
        level: Level at which records are logged.

    Attributes:
        given: The records so far, oldest first.
    """

    def __init__(
        self,
        in_words: Callable[[_Record], str],
        sink: JsonLines | None = None,
        run_id: str = "",
        level: int = logging.INFO,
    ) -> None:
        self._in_words: Callable[[_Record], str] = in_words
        self._sink = sink
        self._run_id = run_id
        self._level = level
        self.given: list[_Record] = []

    def give(self, record: _Record) -> None:
        """Add one record. An error while it is written does not end the run."""
        record = replace(record, run=self._run_id)
        self.given.append(record)
        if self._sink is not None:
            _logger.log(self._level, "NaNGuard: %s", self._in_words(record))
            with contextlib.suppress(Exception):
                self._sink.write(record)

    def close(self) -> None:
        """Try once more to write records that could not be written."""
        if self._sink is not None:
            with contextlib.suppress(Exception):
                self._sink.close()
