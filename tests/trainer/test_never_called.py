"""A guard that guards nothing says so."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_nanguard import NaNGuard
from tests.helpers import Batch, Task, TwoOptimizers, data_for, fit, mlp, task, with_nan


class Bare(TwoOptimizers):
    """Steps the optimizers of torch behind the Trainer's back."""

    def optimizers(self, use_pl_optimizer: bool = True) -> object:
        return super().optimizers(use_pl_optimizer=False)


def test_a_guard_that_is_never_called_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """When it is gone, or the process ends, and no hook of it was ever called."""
    guard = NaNGuard()
    del guard
    gc.collect()
    assert "no Trainer ever called it" in caplog.text
    code = "import logging; logging.basicConfig(); from lightning_nanguard import NaNGuard; guard = NaNGuard()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "no Trainer ever called it" in done.stderr


def test_a_guard_in_use_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither at the end of a fit nor when it is gone."""
    guard = NaNGuard(dirpath=tmp_path)
    fit(task(), data_for("mlp", 2), guard, folder=tmp_path)
    del guard
    gc.collect()
    assert "NaNGuard" not in "".join(record.message for record in caplog.records if record.levelname == "WARNING")


def test_a_fit_whose_steps_are_not_seen_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Under manual optimization, where the bare optimizers are stepped."""
    torch_only = Bare()
    fit(torch_only, data_for("mlp", 2), NaNGuard(dirpath=tmp_path), folder=tmp_path)
    assert "no optimizer step was seen" in caplog.text


class StepsInHooks(Task):
    """Makes its updates in hooks on the parameters, as the backward pass goes."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.automatic_optimization = False

    def on_fit_start(self) -> None:
        for parameter in self.parameters():
            optimizer = torch.optim.SGD([parameter], lr=0.01)
            parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch, "loss"))

    def configure_optimizers(self) -> None:
        return None


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_a_fit_that_is_not_guarded_is_not_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Weights that were lost in updates which the guard cannot see are told at the end, and raise no error."""
    guard = NaNGuard(dirpath=tmp_path)
    run = fit(StepsInHooks(), [with_nan(batch) for batch in data_for("mlp", 2)], guard, folder=tmp_path)
    assert run.trainer.state.finished
    assert "is no longer finite at the end of the run. No update was guarded" in caplog.text
    assert len(guard.interventions) == 0


class CallsTheClosure(Task):
    """Calls the closure itself, and steps without it."""

    def __init__(self) -> None:
        super().__init__(mlp())

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        optimizer.optimizer.step()


def test_an_optimizer_step_that_is_not_seen_says_what_to_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Under automatic optimization the advice is to give the closure to the optimizer."""
    fit(CallsTheClosure(), data_for("mlp", 2), NaNGuard(dirpath=tmp_path), folder=tmp_path)
    assert "pass the closure to optimizer.step" in caplog.text
