"""Training steps while a Trainer validates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def as_in_training(trainer: Any) -> Iterator[None]:
    """Inside, stage and modules are as in training, and gradients are enabled, also while the Trainer validates."""
    if trainer.training:
        yield
        return
    stage, module = trainer.state.stage, trainer.lightning_module
    training = trainer.fit_loop.epoch_loop.val_loop._module_mode.mode
    modes = [(one, one.training, training.get(name, True)) for name, one in module.named_modules()]
    try:
        trainer.training = True  # selects the loop to which ``self.log`` belongs
        for one, _, trains in modes:
            one.training = trains
        with torch.enable_grad():
            yield
    finally:
        for one, evaluates, _ in modes:
            one.training = evaluates
        trainer.state.stage = stage
