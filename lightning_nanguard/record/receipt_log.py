"""Keeps receipts in memory, on the console and in a file."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from typing import final

from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.record.receipts import Receipt

_logger = logging.getLogger("lightning_nanguard")


@final
class ReceiptLog:
    """Keeps the receipts of one fit in memory, on the console, and in a file beside the records.

    Args:
        sink: The file; ``None`` keeps them in memory only.
        run_id: Id of the run, which each receipt is given.

    Attributes:
        given: The receipts so far, oldest first.
    """

    def __init__(self, sink: JsonLines | None = None, run_id: str = "") -> None:
        self._sink = sink
        self._run_id = run_id
        self.given: list[Receipt] = []

    def give(self, receipt: Receipt) -> None:
        """Take one receipt; an error while it is written does not end the run."""
        receipt = replace(receipt, run=self._run_id)
        self.given.append(receipt)
        if self._sink is not None:
            step = receipt.intervention_step
            _logger.info("NaNGuard: result of the intervention of step %d: %s", step, receipt.in_words())
            with contextlib.suppress(Exception):
                self._sink.write(receipt)

    def close(self) -> None:
        """Try once more to write what could not be written."""
        if self._sink is not None:
            with contextlib.suppress(Exception):
                self._sink.close()
