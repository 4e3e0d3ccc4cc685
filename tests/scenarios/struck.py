"""Runs that meet one fault, in every way to train, shared by the scenarios."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback
from torch import nn, optim
from torch.optim import Optimizer

from lightning_nanguard import (
    NaNGuard,
)
from tests.helpers import (
    FaultAt,
    Run,
    data_for,
    fit,
    learner_of,
    non_finite,
    task,
)

NAN, INF = math.nan, math.inf


STEPS = 40


# How the same 40 updates are made.
WAYS: dict[str, dict[str, Any]] = {
    "automatic": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "manual": {},
}


def adam(parameters: list[nn.Parameter]) -> Optimizer:
    return optim.Adam(parameters, lr=0.01)


def struck(way: str, fault: FaultAt, guard: NaNGuard, folder: Path, *more: Callback, **options: Any) -> Run:
    """A run of 40 updates that meets a fault."""
    model = "manual" if way == "manual" else "norm"
    window = WAYS[way].get("accumulate_grad_batches", 1)
    data = data_for(model, STEPS * window)
    run = fit(task(model, adam), data, guard, folder=folder, callbacks=[fault, *more], **WAYS[way], **options)
    assert fault.hits >= 1, "the fault was never put in"
    return run


def batch_of(way: str, step: int) -> int:
    return step * WAYS[way].get("accumulate_grad_batches", 1)


def assert_sound(run: Run, guard: NaNGuard) -> None:
    """All that is learned is finite, it learned, and the rate was left alone."""
    assert non_finite(learner_of(run.trainer, run.module)) == []
    assert guard.lr_multiplier == 1.0
    assert guard.clip_val is None
    losses = [row[key] for _, row in run.logger.rows for key in row if key in ("loss_step", "loss_1_step")]
    assert losses[-1] < losses[0]
    for found in guard.interventions:
        assert found.lr_before == found.lr_after == 0.01
        assert found.applied
        assert found.message
        json.dumps(found.to_dict(), allow_nan=False)
