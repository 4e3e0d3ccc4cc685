"""One run of a micro-batch, and what it gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.callbacks import LambdaCallback

from lightning_nanguard import NaNGuard
from tests.helpers import batches, fit
from tests.trainer.faulty_steps import Faulty


@pytest.mark.parametrize("hook", ["on_before_zero_grad", "on_before_backward", "on_after_backward"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_an_error_of_a_callback_is_raised_as_it_was(hook: str, accumulated: int, tmp_path: Path) -> None:
    """It ends the run at once with its traceback, whatever its type, and no step is made again for it."""

    def fails(trainer: Any, *args: Any) -> None:
        if trainer.fit_loop.batch_idx == 2:
            raise ValueError("a mistake of the callback's")

    guard, module = NaNGuard(), Faulty(None)
    callback = LambdaCallback(**{hook: fails})
    with pytest.raises(ValueError, match="mistake of the callback's") as raised:
        fit(module, batches(), guard, folder=tmp_path, callbacks=[callback], accumulate_grad_batches=accumulated)
    assert raised.traceback[-1].name == "fails"
    assert module.steps == 3
    assert guard.interventions == []
