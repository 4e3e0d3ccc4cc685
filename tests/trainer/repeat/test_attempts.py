"""One run of a micro-batch, and what it gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import LambdaCallback
from torch import nn

from lightning_nanguard import NaNGuard
from lightning_nanguard.trainer.repeat.attempts import Attempts
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


def test_copies_of_gradients() -> None:
    """None for a parameter without one. That a run goes on without room for them is in test_memory_short.py."""
    runs = object.__new__(Attempts)
    module: Any = nn.ParameterList([torch.ones(1), torch.ones(1)])
    runs.module, (one, other) = module, module
    one.grad = torch.ones(1)
    copies = runs.gradients()
    assert runs.gradients_if_room() == copies
    one.grad.fill_(2.0)
    assert copies[1] is None
    assert float(copies[0]) == 1.0
    other.grad = torch.ones(1)
    runs.give_gradients(copies)
    assert one.grad is copies[0]
    assert other.grad is None
    runs.give_gradients()
    assert one.grad is None
