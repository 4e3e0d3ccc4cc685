"""What the parts that run steps again share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytorch_lightning import Callback

from lightning_nanguard import NaNGuard
from lightning_nanguard.trainer.repeat.parts import RepeatParts, made_parts
from tests.helpers import data_for, fit, task


def test_the_parts_of_a_fit_are_made_once_and_belong_together(tmp_path: Path) -> None:
    """They look at losses and gradients with the guard of the fit, and begin with an empty window."""
    made: list[RepeatParts] = []

    class Make(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            assert guard._fit is not None
            mine, replay = guard._fit.guard, guard._fit.replay
            made.append(made_parts(trainer, pl_module, mine, replay, lambda callback: False, None))
            assert made[0].check is mine.steps.check

    guard = NaNGuard()
    fit(task("norm"), data_for("norm", 2), guard, folder=tmp_path, callbacks=[Make()])
    (parts,) = made
    assert parts.window.micros == []
    assert parts.memory.repeatable
    assert parts.keeper is None
