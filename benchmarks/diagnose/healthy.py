"""Healthy runs: advised before the first step, examined when they stand still and when asked, and nothing is found."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from benchmarks.rescue.cases import HEALTHY
from benchmarks.rescue.running import train
from lightning_nanguard import NaNGuard
from lightning_nanguard.types import Finding

from .running import LOW

NAMES = tuple(form.name for form in HEALTHY)


class Ask(pl.Callback):
    """Asks for an examination once, after two thirds of the run."""

    def __init__(self, guard: NaNGuard, at: int) -> None:
        self.guard, self.at, self.seen = guard, at, 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.seen += 1
        if self.seen == self.at:
            self.guard.examine()


def said_of(name: str, seed: int, *, ask: bool = False) -> list[Finding]:
    """Every finding above low confidence of a healthy run.

    Args:
        name: A form of the rescue suite.
        seed: The case.
        ask: Whether it is examined on request as well.
    """
    case = next(form for form in HEALTHY if form.name == name).draw(seed)
    guard = NaNGuard(preflight=True, examine_after=64)
    callbacks: list[pl.Callback] = [guard, Ask(guard, 2 * case.steps // 3)] if ask else [guard]
    train(case, callbacks)
    found = [one.finding for one in guard.interventions if one.finding is not None]
    found += [one.finding for one in guard.advice]
    return [finding for finding in found if finding.confidence > LOW]
