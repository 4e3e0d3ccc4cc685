"""Runs a problem under the guard and says what it named."""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_nanguard import NaNGuard, TrainingDivergedError
from lightning_nanguard.trainer.offline.check import check_batch
from lightning_nanguard.types import Finding

from .problems import Problem

LOW = 0.5
"""Confidence up to which a finding is a guess, and not counted as said."""


class Batches(Dataset[Any]):
    """Ready batches, run through again from the start where more are asked for."""

    def __init__(self, batches: list[Any], count: int) -> None:
        self.batches, self.count = batches, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.batches[index % len(self.batches)]


class Disturb(pl.Callback):
    """Does what goes wrong by itself before each update."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.step = problem, 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if self.problem.disturb is not None:
            self.problem.disturb(self.step, module.net, trainer.optimizers[0])
        self.step += 1


@dataclass(frozen=True, slots=True)
class Said:
    """What was said of a run.

    Attributes:
        finding: The first-ranked finding, ``None`` where there was none.
        fault: What a detector had found.
        count: Findings above low confidence, over the whole run.
    """

    finding: Finding | None
    fault: str = ""
    count: int = 0


def run(problem: Problem) -> Said:
    """Fit the problem with the guard; the finding is that of its first intervention, or else the surest advice."""
    if problem.look == "check":
        found = [one for one in checked(problem) if one.confidence > LOW]
        return Said(next(iter(found), None), "", len(found))
    examines = problem.look == "examine"
    patience = (problem.patience or problem.steps - 24) if examines else None
    # Finite runs are proved to fail by a trial. What looks before the run, or at a loss that does not move, is asked
    # in the guard's default mode, in which no trial is made.
    act_on: Literal["certain", "evidence"] = "evidence" if problem.look == "fit" else "certain"
    guard = NaNGuard(preflight=problem.look == "preflight", examine_after=patience, act_on=act_on)
    fit(problem, [guard, Disturb(problem)])
    advised = [advice.finding for advice in guard.advice if advice.finding.confidence > LOW]
    if not len(guard.interventions):
        return Said(max(advised, key=lambda one: one.confidence, default=None), "", len(advised))
    found = [one.finding for one in guard.interventions if one.finding is not None]
    first = guard.interventions[0] if len(guard.interventions) else None
    said = sum(one.confidence > LOW for one in found) + len(advised)
    return Said(None, "", said) if first is None else Said(first.finding, first.fault, said)


class Check(pl.Callback):
    """Looks at a batch as ``nanguard check --gradients`` does."""

    def __init__(self) -> None:
        self.findings: Sequence[Finding] = ()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.findings = check_batch(trainer, module, batch, gradients=True).findings


def checked(problem: Problem) -> Sequence[Finding]:
    """What the check before a run finds, the surest first."""
    check = Check()
    fit(problem, [check], limit_train_batches=1)
    return check.findings


def fit(problem: Problem, callbacks: list[pl.Callback], **options: Any) -> Exception | None:
    """Fit a problem with some callbacks, quietly; the exception that ended it, if any."""
    folder = tempfile.mkdtemp(prefix="diagnose-")
    accumulate = problem.options.get("accumulate_grad_batches", 1)
    loader = DataLoader(Batches(problem.batches, problem.steps * accumulate), batch_size=None)
    try:
        with quiet():
            trainer = pl.Trainer(
                accelerator="cpu",
                devices=1,
                max_epochs=1,
                logger=False,
                callbacks=callbacks,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=folder,
                **{**problem.options, **options},
            )
            trainer.fit(problem.module, loader)
    except (TrainingDivergedError, RuntimeError, FloatingPointError) as error:
        return error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """Neither warnings nor log lines; one thread."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning", "lightning_nanguard")]
    levels = [logger.level for logger in loggers]
    threads = torch.get_num_threads()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
