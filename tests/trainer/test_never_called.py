"""A guard that guards nothing says so."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_nanguard import NaNGuard
from tests.helpers import TwoOptimizers, data_for, fit, task


class Bare(TwoOptimizers):
    """Steps the optimizers of torch behind the Trainer's back."""

    def optimizers(self, use_pl_optimizer: bool = True) -> object:
        return super().optimizers(use_pl_optimizer=False)


def test_a_guard_that_is_never_called_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """When it is gone, or the process ends, and no hook of it was ever called."""
    guard = NaNGuard()
    del guard
    gc.collect()
    assert "no Trainer has ever called it" in caplog.text
    code = "import logging; logging.basicConfig(); from lightning_nanguard import NaNGuard; guard = NaNGuard()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "no Trainer has ever called it" in done.stderr


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
