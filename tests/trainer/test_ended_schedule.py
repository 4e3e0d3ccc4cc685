"""A schedule that lowered every rate almost to zero is named once it has not raised one for as long again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as schedulers

from lightning_nanguard import NaNGuard
from tests.helpers import batches, fit, task

FORMS: dict[str, tuple[Any, int | None]] = {
    "restart after the first updates": (lambda made: schedulers.CosineAnnealingWarmRestarts(made, 65), None),
    "restart in the last moment": (
        lambda made: schedulers.LambdaLR(made, lambda n: 1e-3 if 40 < n < 127 else 1.0),
        None,
    ),
    "a cosine that rises again": (lambda made: schedulers.CosineAnnealingLR(made, 64), None),
    "ended": (lambda made: schedulers.ExponentialLR(made, 0.9), 128),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_schedule_that_has_ended(form: str, tmp_path: Path) -> None:
    """Restarts are left alone, and a schedule that ended is named when its rate has stayed near zero."""
    make, step = FORMS[form]
    module = task(optimizer=lambda p: torch.optim.SGD(p, 0.01), scheduler=make)
    guard = NaNGuard(dirpath=tmp_path)
    fit(module, batches(count=300), guard, folder=tmp_path)
    told = [(one.finding.cause, one.global_step, one.occasion) for one in guard.advice]
    assert told == ([] if step is None else [("schedule_ended", step, "first updates")])
    assert not told or "has not raised it again in the 64 updates after them" in guard.advice[0].finding.suggestion
