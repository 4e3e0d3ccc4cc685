"""A sink that writes interventions as text to the trainer's loggers."""

from __future__ import annotations

from collections import Counter
from typing import Any, final

from lightning_nanguard.record.base import Sink
from lightning_nanguard.record.messages import tell, tell_again
from lightning_nanguard.trainer.private.packages import Trainer, is_kind, logged_at
from lightning_nanguard.types import Intervention, Kind


@final
class LoggerWords(Sink):
    """Writes the 1st, 2nd, 4th, 8th … intervention of each kind as text to loggers that support text.

    TensorBoard shows them under Text, W&B as a table, MLflow as the artifact ``nanguard/interventions.txt``; CSV files
    have no text.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._seen: Counter[Kind] = Counter()
        self._rows: list[list[Any]] = []

    def write(self, intervention: Intervention) -> None:
        """Log the intervention, or count it."""
        self._seen[intervention.kind] += 1
        seen = self._seen[intervention.kind]
        if seen & (seen - 1):
            return
        words = tell(intervention) if seen == 1 else f"{tell_again(intervention)} ({seen:,} so far)"
        step = logged_at(self._trainer)
        self._rows.append([step, words])
        for logger in self._trainer.loggers:
            self._log(logger, words, step)

    def _log(self, logger: Any, words: str, step: int) -> None:
        if hasattr(logger, "log_text"):  # W&B replaces the whole table
            rows = [list(row) for row in self._rows]
            logger.log_text("nanguard/interventions_told", columns=["step", "what"], data=rows, step=step)
        elif is_kind(logger, "MLFlowLogger"):  # MLflow replaces the whole file
            text = "".join(f"{row[1]}\n" for row in self._rows)
            logger.experiment.log_text(logger.run_id, text, "nanguard/interventions.txt")
        elif hasattr(getattr(logger, "experiment", None), "add_text"):
            # TensorBoard renders Markdown. A code block is not rendered.
            code = "\n".join(f"    {line}" for line in words.split("\n"))
            logger.experiment.add_text("nanguard/interventions", code, step)
