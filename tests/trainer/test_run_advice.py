"""Advice about a GradScaler of the module's own whose scale falls to nothing, and about many skipped updates."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.amp import GradScaler
from torch.optim import lr_scheduler as schedulers

from lightning_nanguard import NaNGuard, SkipStep
from lightning_nanguard.act.defaults import default_remedies
from lightning_nanguard.trainer.run_advice import SkipShare, fallen_scales
from lightning_nanguard.types import Intervention
from tests.helpers import Task, batches, differences, fit, mlp, state_of, task
from tests.trainer.test_sample_finder import rows, trained


class OwnScaler(Task):
    """Manual optimization with a scaler of its own; from one batch on all gradients overflow."""

    def __init__(self, bad_from: int) -> None:
        torch.manual_seed(0)
        super().__init__(mlp())
        self.automatic_optimization = False
        self.scaler = GradScaler("cpu", init_scale=256.0)
        self.bad_from = bad_from

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx) * (float("inf") if batch_idx >= self.bad_from else 1.0)
        self.manual_backward(self.scaler.scale(loss))
        self.scaler.step(optimizer)
        self.scaler.update()


@pytest.mark.parametrize("settings", [{}, {"act_on": "evidence"}, {"observe": True}], ids=str)
def test_the_user_is_told_once(settings: dict[str, Any], tmp_path: Path) -> None:
    """The scaler skips each step by itself, so no update is ever seen; nothing is changed."""
    guard = NaNGuard(**settings)
    run = fit(OwnScaler(6), batches(count=24), guard, folder=tmp_path, max_epochs=3)
    (advice,) = guard.advice
    assert (advice.finding.cause, advice.finding.place) == ("loss_scale_collapse", "the GradScaler in scaler")
    bare = fit(OwnScaler(6), batches(count=24), folder=tmp_path, max_epochs=3)
    assert differences(state_of(run), state_of(bare)) == []
    healthy = NaNGuard(**settings)
    fit(OwnScaler(100), batches(count=24), healthy, folder=tmp_path)
    assert not healthy.advice


def test_scalers_that_are_off_have_no_scale() -> None:
    """They are left out."""
    module = OwnScaler(0)
    module.scaler = GradScaler("cpu", init_scale=0.5)
    assert len(list(fallen_scales(module))) == 1
    module.scaler = GradScaler("cpu", enabled=False)
    assert list(fallen_scales(module)) == []


SKIP = Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1)


def test_only_what_was_skipped_counts() -> None:
    """Other remedies, and what was only observed, are no skipped updates."""
    share = SkipShare()
    for other in (replace(SKIP, remedies=("restore",)), replace(SKIP, applied=False)):
        assert [share.note(other, 20) for _ in range(5)] == [None] * 5
    assert [share.note(SKIP, 20) is None for _ in range(4)] == [True, True, False, True]


BAD = {f"x{row}": math.nan for row in range(0, 192, 24)}


@pytest.mark.parametrize("kept", [False, True])
def test_advice_in_a_run(kept: bool, tmp_path: Path) -> None:
    """A third of all batches is skipped: the advice names ``keep_good_samples``, and for which losses it is meant; none
    where that is on."""
    remedies: list[Any] = [SkipStep(keep_good_samples=kept), *default_remedies()]
    guard: NaNGuard = trained(rows(192, **BAD), tmp_path, max_epochs=2, guard={"remedies": remedies})
    said = [one.finding for one in guard.advice if one.finding.cause == "many_skipped_batches"]
    assert len(said) == (0 if kept else 1)
    assert all("SkipStep(keep_good_samples=True)" in one.suggestion for one in said)
    assert all("a plain mean or sum over samples (not contrastive)" in one.suggestion for one in said)


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
