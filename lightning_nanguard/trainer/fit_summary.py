"""Summarises the present or the last fit in one line."""

from __future__ import annotations

from pathlib import Path

from lightning_nanguard.guard.context import Settings
from lightning_nanguard.record.files import ADVICE_FILE, RECORDS_FILE
from lightning_nanguard.record.memory import Memory
from lightning_nanguard.record.run_log import RUN_FILE, interventions_of_resumed
from lightning_nanguard.record.summary import summary
from lightning_nanguard.record.trials import trials_in_words
from lightning_nanguard.trainer.arguments import Arguments

_TOLD = RUN_FILE, RECORDS_FILE, ADVICE_FILE
"""Files that ``nanguard explain`` tells."""


NO_FIT = (
    "NaNGuard: no fit was guarded in this process. Under ddp_spawn, ddp_fork and ddp_notebook other processes make the "
    "updates. What the guard did is then in the folder of the run, by default nanguard beside the checkpoints: read it "
    "with nanguard explain RUN_DIR"
)
"""What is said instead of a summary if this process has seen no fit."""


def told_folder(folder: Path | None) -> Path | None:
    """The folder if it has a file that ``nanguard explain`` tells, else ``None``."""
    return folder if folder is not None and any((folder / name).is_file() for name in _TOLD) else None


def fit_summary(
    memory: Memory, settings: Arguments | Settings, updates: int, multiplier: float, folder: Path | None
) -> str:
    """The summary line of the newest fit. If the run was resumed, it also has the counts of the whole run.

    Args:
        memory: The interventions of this fit and of earlier ones.
        settings: When the guard changes a run.
        updates: Updates of the run so far.
        multiplier: Factor on the learning rate.
        folder: The folder of the run; ``None`` before the first fit.
    """
    before, faults, remedies = memory.of_fit()
    total = None if folder is None else interventions_of_resumed(folder)
    if total is None and before:
        total = memory.total  # the folder could not be written
    return summary(
        updates - before,
        faults,
        remedies,
        lr_multiplier=multiplier,
        path=told_folder(folder),
        observe=settings.observe,
        act_on=settings.act_on,
        advice=[one.finding.cause for one in memory.advice],
        trials=trials_in_words(memory.trials),
        whole=None if total is None else (updates, total),
    )
